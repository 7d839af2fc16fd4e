"""Random weights at gpt-oss's shapes, on the GPU: timing does not depend on what they are, as long as it is not zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from xmoe.kernels.cuda import backend as triton_backend
from xmoe.kernels.cuda.experts import experts_forward
from xmoe.kernels.cuda.mxfp4 import Hidden, packed_down, packed_gate_up
from xmoe.kernels.cuda.repack import repack
from xmoe.kernels.cuda.routing import SortedRows
from xmoe.model.transformer import Transformer
from xmoe.quantization.packed import PackedWeight

DEVICE = torch.device("cuda")
SWIGLU = {"limit": 7.0, "alpha": 1.702}


def random_blocks(E: int, N: int, K: int) -> tuple[Tensor, Tensor]:
    """Blocks and scales of a checkpoint: all codes alike, scales that make weights of about 0.02."""
    blocks = torch.randint(0, 256, (E, N, K // 32, 16), dtype=torch.uint8, device=DEVICE)
    return blocks, torch.randint(118, 122, (E, N, K // 32), dtype=torch.uint8, device=DEVICE)


class Layer:
    """The experts of one gpt-oss layer: E of them, D 2880 and F 2880, or any other sizes."""

    def __init__(self, E: int, D: int = 2880, F: int = 2880):
        self.num_experts, self.D, self.F = E, D, F
        self.up_bytes, self.down_bytes = random_blocks(E, 2 * F, D), random_blocks(E, D, F)
        self.gate_up = repack(*self.up_bytes, paired=True)
        self.down = repack(*self.down_bytes, paired=False)
        self.gate_up_bias = torch.randn(E, 2 * F, device=DEVICE).bfloat16()
        self.down_bias = torch.randn(E, D, device=DEVICE).bfloat16()

    def first(self, x: Tensor, rows: SortedRows) -> Hidden:
        """gate_up with SwiGLU."""
        return packed_gate_up(x, rows, self.gate_up, self.gate_up_bias, **SWIGLU)

    def second(self, active: Tensor, rows: SortedRows) -> Tensor:
        """down, as partial sums."""
        return packed_down(active, rows, self.down, self.down_bias)

    def all(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Sort, both products and the combine."""
        matrices = self.gate_up, self.gate_up_bias, self.down, self.down_bias
        return experts_forward(x, indices, weights, *matrices, **SWIGLU)[0]

    def dense(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same weights in fp32, with their biases, as `reference.experts` takes them."""
        names = ("blocks", "scales")
        up, down = (
            PackedWeight("mxfp4", dict(zip(names, held))).decode(dtype=torch.float32)
            for held in (self.up_bytes, self.down_bytes)
        )
        return up, self.gate_up_bias.float(), down, self.down_bias.float()


def random_routing(E: int, T: int, K: int = 4) -> Tensor:
    """int64 [T, K]: K different experts for each token, all alike."""
    return torch.rand(T, E, device=DEVICE).topk(K, dim=-1).indices


def routing_over(E: int, T: int, K: int = 4) -> list[Tensor]:
    """Several routings; for few tokens they use disjoint experts, so that no set finds its weights in the cache."""
    if T * K >= E:
        return [random_routing(E, T, K) for _ in range(2)]
    permuted = torch.randperm(E, device=DEVICE)
    return [permuted[i * T * K : (i + 1) * T * K].view(T, K) for i in range(E // (T * K))]


def random_model(config) -> Transformer:
    """A packed bf16 model of this config on the GPU, every weight drawn there; experts in kernel order."""
    with torch.device("meta"):
        model = Transformer(config).bfloat16()
        for block in model.blocks:
            for name in ("gate_up", "down"):
                E, N, K = getattr(block.moe.experts, name).shape
                empty = {"blocks": torch.empty(E, N, K // 32, 16, dtype=torch.uint8)}
                empty["scales"] = torch.empty(E, N, K // 32, dtype=torch.uint8)
                block.moe.experts.pack(name, PackedWeight("mxfp4", empty))
    model = model.to_empty(device=DEVICE).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)
    for block in model.blocks:
        for name in ("gate_up", "down"):
            weight = getattr(block.moe.experts, name)
            weight.blocks.random_(0, 256)
            weight.scales.random_(114, 118)
    triton_backend.prepare(model)
    return model
