"""A few tensors of every kind, and a file of them that the safetensors library wrote."""

import torch
from safetensors.torch import save_file

TENSORS = {
    "a": torch.arange(24, dtype=torch.float32).view(4, 6),
    "b": torch.arange(9, dtype=torch.uint8).view(3, 3, 1),
    "c": torch.randn(5, 7).bfloat16(),
    "d": torch.tensor(3, dtype=torch.int64),
    "e": torch.zeros(0, 4),
}


def one_file(folder):
    folder.mkdir(exist_ok=True)
    save_file({k: v for k, v in TENSORS.items() if v.numel()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"
