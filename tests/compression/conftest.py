"""A small model with unequal dimensions, and text for it."""

from __future__ import annotations

import pytest
import torch

from xmoe.checkpoint.layouts import LAYOUTS
from xmoe.checkpoint.shards import ShardReader, ShardWriter
from xmoe.checkpoint.weights import save
from xmoe.model.config import ModelConfig
from xmoe.quantization.packed import PackedWeight

SHAPE = {
    "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 10, "intermediate_size": 64, "num_experts": 7, "num_experts_per_tok": 3, "sliding_window": 5,
    "max_position_embeddings": 64, "initial_context_length": 16, "rope_scaling_factor": 4.0,
}  # fmt: skip


@pytest.fixture
def config():
    """changes -> a ModelConfig of three layers with seven experts, three a token."""
    return lambda **changes: ModelConfig(**{**SHAPE, **changes})


@pytest.fixture
def model(random_model, config):
    """A random model of :data:`SHAPE`."""
    return random_model(config())


@pytest.fixture
def tokens():
    """int64 [6, 11]"""
    return torch.randint(0, SHAPE["vocab_size"], (6, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def pack():
    """model -> the same model, its experts packed in MXFP4 (in place)."""

    def packed(model):
        for block in model.blocks:
            for name in ("gate_up", "down"):
                block.moe.experts.pack(name, PackedWeight.encode(getattr(block.moe.experts, name).data))
        return model

    return packed


@pytest.fixture
def checkpoint(tmp_path, random_model, config, pack):
    """layout, changes to the config -> a folder with a random model in several shards."""

    def written(layout: str, name: str = "source", seed: int = 0, **changes):
        model = random_model(config(**changes), seed)
        model = model.to(torch.bfloat16) if layout == "hf-bf16" else pack(model).to(torch.bfloat16)
        save(model, tmp_path / f"{name}-whole", layout)
        folder = tmp_path / name
        folder.mkdir()
        for file in (tmp_path / f"{name}-whole").iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        reader = ShardReader(tmp_path / f"{name}-whole")
        tensors = {n: (info.dtype, info.shape) for n, info in reader.tensors.items()}
        with ShardWriter(folder, tensors, max_shard_bytes=40_000, shard_name=LAYOUTS[layout].shard_name) as writer:
            for n in tensors:
                writer.copy_rows(n, reader, n)
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "LICENSE").write_text("Apache-2.0")
        return folder

    return written
