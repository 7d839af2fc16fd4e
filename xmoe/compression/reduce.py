"""Shrink inside experts: magnitude, neurons, int8, int4, mxfp4, or a sequence of these; and honest bytes for each stage.

`fraction` means one thing for all methods: the part of the experts' bytes that goes, or of their weights where no byte
moves (zeros in a dense or packed tensor take as much room as before). A stage's report says both, and says so too where a
stage makes the model larger, as int8 does on MXFP4.

    magnitude   the smallest |w| become zero; MXFP4 can hold zeros exactly, so its scales and other codes stay
    neurons     rows 2i, 2i+1 of gate_up, their biases and column i of down go, the same number in every expert; MXFP4 keeps
                its bytes, since whole aligned groups of 32 go
    int8 int4   per row; per group of 32 inputs; symmetric, round to nearest
    mxfp4       best of three scales a group; weights that are MXFP4 already stay as they are
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xmoe.compression.neurons import cut_neurons, neurons_to_keep
from xmoe.compression.reconstruction import expert_output
from xmoe.compression.routing import RoutingStats
from xmoe.errors import ConfigError
from xmoe.model.experts import Experts, MoE
from xmoe.model.transformer import Transformer
from xmoe.quantization.packed import PackedWeight

METHODS = ("magnitude", "neurons", "int8", "int4", "mxfp4")
SCOPES = ("tensor", "expert", "layer", "global")
_WEIGHTS = ("gate_up", "down")


class Stage(NamedTuple):
    """What one method did to the expert weights.

    bytes and weights (parameters of gate_up and down) before and after; zeros after. weight_error: ||W' - W|| / ||W|| for
    each layer, None where shapes changed. output_error: ||y' - y|| / ||y|| of each layer's MoE on the token sample, against
    the model the sequence began with; None without a sample.
    """

    method: str
    bytes_before: int
    bytes_after: int
    weights_before: int
    weights_after: int
    zeros: int
    weight_error: tuple[float, ...] | None
    output_error: tuple[float, ...] | None

    def line(self) -> str:
        """One row of the table."""
        change = 1 - self.bytes_after / self.bytes_before
        removed = 1 - (self.weights_after - self.zeros) / self.weights_before
        said = f"{self.method:<10}{self.bytes_before:>16,} ->{self.bytes_after:>16,} bytes ({-change:+.1%})"
        said += f"  {removed:6.1%} of weights gone"
        for name, errors in (("weights", self.weight_error), ("outputs", self.output_error)):
            if errors is not None:
                said += f"  error of {name} {sum(errors) / len(errors):.4f}"
        return said + ("  LARGER than before" if self.bytes_after > self.bytes_before else "")


@torch.no_grad()
def reduce(
    model: Transformer,
    methods: Sequence[str],
    fraction: float | None = None,
    *,
    experts: Sequence[tuple[int, int]] | None = None,
    stats: RoutingStats | None = None,
    scope: str = "tensor",
    pattern: tuple[int, int] | None = None,
    group_size: int = 32,
) -> tuple[Transformer, list[Stage]]:
    """A new model with smaller experts, and a report of each stage, in the order of `methods`.

    Args:
        fraction: for magnitude and neurons, see the module's page.
        experts: (layer, expert) to touch; None is all. Only magnitude can leave some out: other methods change a tensor's
            format or shape, which all experts of a layer share.
        stats: with a token sample, neurons are scored by what they contribute to the routed outputs, the means of those
            removed go into the down bias, and output errors are reported. Without, neurons are scored by their weights.
        scope: of magnitude: within what the smallest weights are sought.
        pattern: (N, M): of every M neighbours along the inputs keep the N largest, instead of `fraction`.
        group_size: of int4.

    Raises:
        ConfigError: an unknown method, a fraction outside (0, 1), a combination that cannot work.
    """
    _check(methods, fraction, experts, scope, pattern, model)
    small = copy.deepcopy(model)
    sample = None if stats is None else stats.sample
    stages = []
    for method in methods:
        before = _sizes(small)
        old = [_dense(block.moe.experts) for block in small.blocks]
        if method == "neurons":
            small = cut_neurons(small, neurons_to_keep(small, fraction), sample)
        elif method == "magnitude":
            prune_magnitude(small, fraction, scope, pattern, experts)
        else:
            _quantize(small, method, group_size)
        after = _sizes(small)
        new = [_dense(block.moe.experts) for block in small.blocks]
        same_shape = before[1] == after[1]
        stages.append(
            Stage(
                method,
                before[0],
                after[0],
                before[1],
                after[1],
                sum(int((w == 0).sum()) for pair in new for w in pair),
                tuple(_relative(a, b) for a, b in zip(old, new)) if same_shape else None,
                None if sample is None else _output_errors(model, small, sample),
            )
        )
    return small, stages


def _check(methods, fraction, experts, scope, pattern, model) -> None:
    if unknown := [m for m in methods if m not in METHODS]:
        raise ConfigError(f"unknown method {unknown[0]!r}; there are {', '.join(METHODS)}")
    if scope not in SCOPES:
        raise ConfigError(f"unknown scope {scope!r}; there are {', '.join(SCOPES)}")
    wants = [m for m in methods if m == "neurons" or (m == "magnitude" and pattern is None)]
    if wants and (fraction is None or not 0.0 < fraction < 1.0):
        raise ConfigError(f"{wants[0]} needs a fraction between 0 and 1, both left out; found {fraction}")
    if pattern is not None and not 0 < pattern[0] < pattern[1]:
        raise ConfigError(f"pattern {pattern[0]}:{pattern[1]}: expected N:M with 0 < N < M, such as 2:4")
    if experts is None:
        return
    if whole := [m for m in methods if m != "magnitude"]:
        raise ConfigError(
            f"{whole[0]} changes the format or shape that all experts of a layer share; leave --experts out"
        )
    for layer, e in experts:
        if not 0 <= layer < len(model.blocks) or not 0 <= e < model.config.experts_in_layer(layer):
            raise ConfigError(f"experts {layer}:{e}: there is no such expert")


def _dense(experts: Experts) -> list[Tensor]:
    return [w.decode(dtype=torch.float32) if isinstance(w, PackedWeight) else w.float() for w in _weights(experts)]


def _weights(experts: Experts) -> list[Tensor | PackedWeight]:
    return [getattr(experts, name) for name in _WEIGHTS]


def _sizes(model: Transformer) -> tuple[int, int]:
    """Bytes and count of all expert weights, as they are held."""
    everything = [w for block in model.blocks for w in _weights(block.moe.experts)]
    return sum(w.nbytes for w in everything), sum(w.shape[0] * w.shape[1] * w.shape[2] for w in everything)


def _relative(old: list[Tensor], new: list[Tensor]) -> float:
    above = sum(float((a - b).square().sum()) for a, b in zip(old, new))
    return (above / max(sum(float(a.square().sum()) for a in old), 1e-300)) ** 0.5


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


def _output_errors(old: Transformer, new: Transformer, sample: Tensor) -> tuple[float, ...]:
    errors = []
    for a, b, x in zip(old.blocks, new.blocks, sample):
        x = x.to(old.device)
        wanted = mixture(a.moe, x)
        errors.append(float((mixture(b.moe, x) - wanted).norm() / wanted.norm().clamp(min=1e-30)))
    return tuple(errors)


# ------------------------------------------------------------------------------------------------------- quantization


def _quantize(model: Transformer, format: str, group_size: int) -> None:
    options = {"group_size": group_size} if format == "int4" else {}
    for block in model.blocks:
        for name, weight in zip(_WEIGHTS, _weights(block.moe.experts)):
            if isinstance(weight, PackedWeight):
                if weight.format == format:
                    continue
                weight = weight.decode(dtype=torch.float32)
            block.moe.experts.pack(name, PackedWeight.encode(weight.data, format, **options))


# ---------------------------------------------------------------------------------------------------------- magnitude


def smallest(magnitudes: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of exactly `count` smallest entries over all tensors together; of equal ones the earlier go first."""
    masks = [torch.zeros_like(m, dtype=torch.bool) for m in magnitudes]
    if not count:
        return masks
    flat = torch.cat([m.reshape(-1) for m in magnitudes])
    limit = flat.kthvalue(count).values
    chosen = flat < limit
    ties = (flat == limit).nonzero().squeeze(-1)
    chosen[ties[: count - int(chosen.sum())]] = True
    for mask, part in zip(masks, chosen.split([m.numel() for m in magnitudes])):
        mask.copy_(part.view(mask.shape))
    return masks


def prune_magnitude(
    model: Transformer,
    fraction: float | None,
    scope: str = "tensor",
    pattern: tuple[int, int] | None = None,
    experts: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Set the smallest weights to zero, in place: exactly round(fraction * count) in each scope, or N:M along the inputs."""
    places = [(i, e) for i, b in enumerate(model.blocks) for e in range(b.moe.experts.gate_up_bias.shape[0])]
    chosen = [p for p in places if experts is None or p in set(experts)]
    scopes: dict[tuple, list[tuple[int, int, str]]] = {}
    key: dict[str, Callable] = {
        "tensor": lambda i, e, n: (i, e, n), "expert": lambda i, e, n: (i, e), "layer": lambda i, e, n: (i,),
        "global": lambda i, e, n: (),
    }  # fmt: skip
    for i, e in chosen:
        for name in _WEIGHTS:
            scopes.setdefault(key[scope](i, e, name), []).append((i, e, name))
    for members in scopes.values():
        found = [_matrix(model, *m).abs() for m in members]
        if pattern is not None:
            masks = [_pattern_mask(m, *pattern) for m in found]
        else:
            masks = smallest(found, round(fraction * sum(m.numel() for m in found)))
        for member, mask in zip(members, masks):
            _zero(model, *member, mask)


def _matrix(model: Transformer, layer: int, e: int, name: str) -> Tensor:
    weight = getattr(model.blocks[layer].moe.experts, name)
    return weight.decode([e], dtype=torch.float32)[0] if isinstance(weight, PackedWeight) else weight[e].float()


def _pattern_mask(magnitudes: Tensor, n: int, m: int) -> Tensor:
    if magnitudes.shape[-1] % m:
        raise ConfigError(f"pattern {n}:{m} does not divide the {magnitudes.shape[-1]} inputs of a row")
    groups = magnitudes.unflatten(-1, (-1, m))
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], False).flatten(-2)


def _zero(model: Transformer, layer: int, e: int, name: str, mask: Tensor) -> None:
    weight = getattr(model.blocks[layer].moe.experts, name)
    if not isinstance(weight, PackedWeight):
        weight.data[e].masked_fill_(mask, 0.0)
    elif weight.format == "mxfp4":
        # Code 0 in place of a nibble; scales and all other codes stay.
        low, high = mask[..., 0::2], mask[..., 1::2]
        keep = (~low).to(torch.uint8) * 0x0F | (~high).to(torch.uint8) * 0xF0
        blocks = weight.tensors["blocks"][e]
        blocks &= keep.view(blocks.shape)
    else:
        raise ConfigError(
            f"magnitude cannot set {weight.format} weights to zero in place; put it before {weight.format}"
        )
