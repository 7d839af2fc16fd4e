"""What a reduction did, in numbers: bytes, weights, zeros, and errors of weights and outputs, stage by stage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xmoe.compression.reconstruction import expert_output
from xmoe.model.experts import Experts, MoE
from xmoe.model.transformer import Transformer
from xmoe.quantization.compound import Stack
from xmoe.quantization.packed import PackedWeight, dense_matrix, matrices

_WEIGHTS = ("gate_up", "down")


class Stage(NamedTuple):
    """What one method did to the expert weights.

    bytes and weights (parameters of gate_up and down) before and after; zeros after. weight_error: ||W' - W|| / ||W|| for
    each layer, None where shapes changed. output_error: ||y' - y|| / ||y|| of each layer's MoE on the token sample, against
    the model the sequence began with; None without a sample. detail: what the method chose, in a few words.
    """

    method: str
    bytes_before: int
    bytes_after: int
    weights_before: int
    weights_after: int
    zeros: int
    weight_error: tuple[float, ...] | None
    output_error: tuple[float, ...] | None
    detail: str = ""

    def line(self) -> str:
        """One row of the table."""
        change = 1 - self.bytes_after / self.bytes_before
        removed = 1 - (self.weights_after - self.zeros) / self.weights_before
        said = f"{self.method:<10}{self.bytes_before:>16,} ->{self.bytes_after:>16,} bytes ({-change:+.1%})"
        said += f"  {removed:6.1%} of weights gone"
        for name, errors in (("weights", self.weight_error), ("outputs", self.output_error)):
            if errors is not None:
                said += f"  error of {name} {sum(errors) / len(errors):.4f}"
        said += f"  {self.detail}" if self.detail else ""
        return said + ("  LARGER than before" if self.bytes_after > self.bytes_before else "")

    @classmethod
    def of(
        cls, method: str, before: Transformer, after: Transformer, start: Transformer, sample: Tensor | None
    ) -> Stage:
        """What a method made of `before`; output errors are against `start` on `sample` [layers, N, D]."""
        errors, zeros = compare(before, after)
        counted = (n for pair in zip(sizes(before), sizes(after)) for n in pair)
        return cls(method, *counted, zeros, errors, None if sample is None else output_errors(start, after, sample))

    def joined(self, other: Stage) -> Stage:
        """The same method on the layers of both, those of `other` behind."""
        counts = [getattr(self, n) + getattr(other, n) for n in self._fields[1:6]]
        errors = [None if a is None else a + b for a, b in zip(self[6:8], other[6:8])]
        return Stage(self.method, *counts, *errors, self.detail)


def expert_stacks(experts: Experts) -> list[Stack]:
    """gate_up and down."""
    return [getattr(experts, name) for name in _WEIGHTS]


def sizes(model: Transformer) -> tuple[int, int]:
    """Bytes and count of all expert weights, as they are held."""
    everything = [w for block in model.blocks for w in expert_stacks(block.moe.experts)]
    return (
        sum(w.nbytes for w in everything),
        sum(w.count if isinstance(w, PackedWeight) else w.numel() for w in everything),
    )


def compare(old: Transformer, new: Transformer) -> tuple[tuple[float, ...] | None, int]:
    """||W' - W|| / ||W|| of each layer (None where shapes changed), and zeros in what is stored now; expert by expert."""
    same = old.config.intermediate_size == new.config.intermediate_size
    errors, zeros = [], 0
    for a, b in zip(old.blocks, new.blocks):
        above, below = 0.0, 0.0
        for first, second in zip(expert_stacks(a.moe.experts), expert_stacks(b.moe.experts)):
            for e in range(second.shape[0]):
                parts = matrices(second, e, torch.float32)
                zeros += sum(int((part == 0).sum()) for part in parts)
                if same:
                    was = dense_matrix(first, e)
                    now = parts[0] if len(parts) == 1 else parts[0] @ parts[1]
                    above += float((was - now).square().sum(dtype=torch.float64))
                    below += float(was.square().sum(dtype=torch.float64))
        errors.append((above / max(below, 1e-300)) ** 0.5)
    return tuple(errors) if same else None, zeros


def mixture(moe: MoE, x: Tensor) -> Tensor:
    """The MoE's output on x [N, D] in fp32, whatever its experts are held in."""
    routing = moe.router(x.to(moe.router.weight.dtype))
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in range(routing.logits.shape[-1]):
        token, slot = (routing.indices == e).nonzero(as_tuple=True)
        if len(token):
            out = expert_output(moe.experts, e, x[token])[1]
            y.index_add_(0, token, out * routing.weights[token, slot].unsqueeze(-1))
    return y


def output_errors(old: Transformer, new: Transformer, sample: Tensor) -> tuple[float, ...]:
    errors = []
    for a, b, x in zip(old.blocks, new.blocks, sample):
        x = x.to(old.device)
        wanted = mixture(a.moe, x)
        errors.append(float((mixture(b.moe, x) - wanted).norm() / wanted.norm().clamp(min=1e-30)))
    return tuple(errors)
