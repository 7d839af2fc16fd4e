"""Shrink inside experts: magnitude, neurons, low rank, int8, int4, mxfp4, or a sequence; and honest bytes for each stage.

`fraction` means one thing for all methods: the part of the experts' bytes that goes, or of their weights where no byte
moves (zeros in a dense or packed tensor take as much room as before). A stage's report says both, and says so too where a
stage makes the model larger, as int8 does on MXFP4.

    magnitude   the weights that matter least become zero; every format can hold zeros exactly, so scales and other codes stay
    neurons     rows 2i, 2i+1 of gate_up, their biases and column i of down go, the same number in every expert; packed
                weights keep their bytes, since whole aligned groups go
    low-rank    two thin factors in place of each matrix, stored and run as such; plain, or fitted to what experts are fed
    int8 int4   per row; per group of 32 inputs; symmetric, round to nearest
    mxfp4       best of three scales a group; weights that are MXFP4 already stay as they are

Any may follow any. What is packed is decoded to be factored, and zeros do not survive that; factors are packed, zeroed and
cut as factors, and stored and run as such. Experts that are named alone then stand beside others of another form.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xmoe.compression.identity import model_hash
from xmoe.compression.layerwise import as_batches
from xmoe.compression.low_rank import Packing, Place, choose_ranks, factor_experts, one, replace_experts
from xmoe.compression.magnitude import SCOPES, SCORES, input_norms, prune_magnitude
from xmoe.compression.neurons import cut_neurons, neurons_to_keep
from xmoe.compression.reconstruction import expert_output
from xmoe.compression.routing import RoutingStats, record_routing
from xmoe.errors import ConfigError, DataError
from xmoe.model.experts import Experts, MoE
from xmoe.model.transformer import Transformer
from xmoe.quantization.compound import pack_factors, rank_unit
from xmoe.quantization.packed import PackedWeight, dense_matrix, matrices

METHODS = ("magnitude", "neurons", "low-rank", "int8", "int4", "mxfp4")
QUANTIZED = ("int8", "int4", "mxfp4")
SAMPLE = 512
"""Tokens on which output errors are measured where only text was given."""

_WEIGHTS = ("gate_up", "down")
_ALIASES = {"svd": "low-rank", "rank": "low-rank", "lowrank": "low-rank", "prune": "magnitude", "sparsity": "magnitude"}


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


@torch.no_grad()
def reduce(
    model: Transformer,
    methods: Sequence[str],
    fraction: float | None = None,
    *,
    experts: Sequence[tuple[int, int]] | None = None,
    stats: RoutingStats | None = None,
    batches: Iterable | None = None,
    scope: str | None = None,
    score: str = "magnitude",
    pattern: tuple[int, int] | None = None,
    group_size: int = 32,
    rank: tuple[int, int] | None = None,
    whiten: bool = False,
) -> tuple[Transformer, list[Stage]]:
    """A new model with smaller experts, and a report of each stage, in the order of `methods`.

    Args:
        fraction: for magnitude, neurons and low-rank, see the module's page.
        experts: (layer, expert) to touch; None is all. neurons takes all or nothing, since all experts of the model have
            one width.
        stats: with a token sample, neurons are scored by what they contribute to the routed outputs, the means of those
            removed go into the down bias, and output errors are reported. Without, neurons are scored by their weights.
        batches: text, as for recording, in place of the sample or beside it: what experts are fed is then gathered from
            all of it, layer by layer, of the model as it is when a stage begins.
        scope: of magnitude: within what the least weights are sought; None is a tensor, or a row where `score` looks at
            inputs, as published.
        score: of magnitude: what makes a weight small; see :mod:`xmoe.compression.magnitude`.
        pattern: (N, M): of every M neighbours along the inputs keep the N largest, instead of `fraction`.
        group_size: of int4.
        rank: of low-rank: those of gate_up and down, instead of `fraction`.
        whiten: fit low-rank factors to what the experts are fed, by `batches` or the sample of `stats`.

    Raises:
        ConfigError: an unknown method, a fraction outside (0, 1), a combination that cannot work, a rank that saves
            nothing. DataError: statistics of another model.
    """
    methods = [_method(m) for m in methods]
    scope = scope or ("tensor" if score == "magnitude" else "row")
    _check(methods, fraction, scope, score, pattern, rank)
    chosen = _chosen(methods, experts, model)
    packings = [_packing_after(methods[i:], group_size) for i in range(len(methods))]
    if stats is not None and stats.model and stats.model != model_hash(model):
        raise DataError(f"the statistics are of model {stats.model}, this is model {model_hash(model)}")
    if methods[:1] == ["low-rank"]:
        choose_ranks(model, chosen, fraction, rank, packings[0])  # says no before any text is read
    sample = None if stats is None else stats.sample
    text = None if batches is None else list(as_batches(batches, model.device))
    if (whiten or score != "magnitude") and sample is None and text is None:
        asks = "--whiten" if whiten else f"the score {score}"
        raise ConfigError(f"{asks} looks at what experts are fed; give --data, or --stats recorded with --sample")
    if sample is None and text is not None:
        sample = record_routing(model, text, sample=SAMPLE).sample
    small, stages = model, []
    for at, method in enumerate(methods):
        before, detail = small, ""
        small = (
            cut_neurons(before, neurons_to_keep(before, fraction, packings[at].unit if packings[at] else 1), sample)
            if method == "neurons"
            else copy.deepcopy(before)
        )
        if method == "magnitude":
            norms = None if score == "magnitude" else input_norms(small, score, sample, text)
            prune_magnitude(small, fraction, scope, pattern, experts, norms)
            detail = f"{score}, by {scope}" if pattern is None else f"{score}, {pattern[0]}:{pattern[1]}"
        elif method == "low-rank":
            ranks = choose_ranks(small, chosen, fraction, rank, packings[at])
            fed = {"sample": None if text else sample, "batches": text} if whiten else {}
            detail = factor_experts(small, ranks, **fed)
            detail += "; the zeros before it did not survive" if "magnitude" in methods[:at] else ""
        elif method in QUANTIZED:
            detail = _quantize(small, method, group_size, chosen)
        errors, zeros = _compare(before, small)
        stages.append(
            Stage(
                method,
                *(n for pair in zip(_sizes(before), _sizes(small)) for n in pair),
                zeros,
                errors,
                None if sample is None else _output_errors(model, small, sample),
                detail,
            )
        )
    return small, stages


# ------------------------------------------------------------------------------------------------------------ checking


def _method(text: str) -> str:
    name = text.strip().lower().replace("_", "-")
    if name in METHODS:
        return name
    near = [_ALIASES[name]] if name in _ALIASES else difflib.get_close_matches(name, METHODS, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"unknown method {text!r}; {meant}there are {', '.join(METHODS)}")


def _check(methods, fraction, scope, score, pattern, rank) -> None:
    if scope not in SCOPES:
        raise ConfigError(f"unknown scope {scope!r}; there are {', '.join(SCOPES)}")
    if score not in SCORES:
        raise ConfigError(f"unknown score {score!r}; there are {', '.join(SCORES)}")
    instead = {"neurons": False, "magnitude": pattern is not None, "low-rank": rank is not None}
    wants = [m for m in methods if not instead.get(m, True)]
    if wants and (fraction is None or not 0.0 < fraction < 1.0):
        raise ConfigError(f"{wants[0]} needs a fraction between 0 and 1, both left out; found {fraction}")
    if pattern is not None and not 0 < pattern[0] < pattern[1]:
        raise ConfigError(f"pattern {pattern[0]}:{pattern[1]}: expected N:M with 0 < N < M, such as 2:4")


def _packing_after(methods: Sequence[str], group_size: int) -> Packing | None:
    """The packing that what the first of `methods` makes will meet with, before the same method comes again.

    Sizes then suit its groups, and no byte goes into filling them up.
    """
    first, *later = methods
    later = later[: later.index(first)] if first in later else later
    formats = [m for m in later if m in QUANTIZED]
    return Packing(formats[-1], group_size, max(rank_unit(m, group_size) for m in formats)) if formats else None


def _chosen(methods: Sequence[str], experts: Sequence[Place] | None, model: Transformer) -> Collection[Place]:
    """The experts to touch; a ConfigError where the choice is not possible for a method."""
    counts = [model.config.experts_in_layer(i) for i in range(len(model.blocks))]
    if experts is None:
        return {(i, e) for i, n in enumerate(counts) for e in range(n)}
    for layer, e in experts:
        if not 0 <= layer < len(counts) or not 0 <= e < counts[layer]:
            raise ConfigError(f"experts {layer}:{e}: there is no such expert")
    if "neurons" in methods:
        raise ConfigError("neurons changes the width that all experts of the model share; leave --experts out")
    return set(experts)


# ------------------------------------------------------------------------------------------------------------ measuring


def _weights(experts: Experts) -> list[Tensor | PackedWeight]:
    return [getattr(experts, name) for name in _WEIGHTS]


def _sizes(model: Transformer) -> tuple[int, int]:
    """Bytes and count of all expert weights, as they are held."""
    everything = [w for block in model.blocks for w in _weights(block.moe.experts)]
    return (
        sum(w.nbytes for w in everything),
        sum(w.count if isinstance(w, PackedWeight) else w.numel() for w in everything),
    )


def _compare(old: Transformer, new: Transformer) -> tuple[tuple[float, ...] | None, int]:
    """||W' - W|| / ||W|| of each layer (None where shapes changed), and zeros in what is stored now; expert by expert."""
    same = old.config.intermediate_size == new.config.intermediate_size
    errors, zeros = [], 0
    for a, b in zip(old.blocks, new.blocks):
        above, below = 0.0, 0.0
        for first, second in zip(_weights(a.moe.experts), _weights(b.moe.experts)):
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


def _output_errors(old: Transformer, new: Transformer, sample: Tensor) -> tuple[float, ...]:
    errors = []
    for a, b, x in zip(old.blocks, new.blocks, sample):
        x = x.to(old.device)
        wanted = mixture(a.moe, x)
        errors.append(float((mixture(b.moe, x) - wanted).norm() / wanted.norm().clamp(min=1e-30)))
    return tuple(errors)


# ------------------------------------------------------------------------------------------------------- quantization


def _quantize(model: Transformer, format: str, group_size: int, chosen: Collection[Place]) -> str:
    """Encode the weights of the experts `chosen`, in place, factors as factors; in a few words what had to be added."""
    options = {"group_size": group_size} if format == "int4" else {}
    padded = set()

    def encoded(weight: Tensor | PackedWeight) -> Tensor | PackedWeight:
        if isinstance(weight, Tensor):
            return PackedWeight.encode(weight, format, **options)
        if weight.factors:
            if weight.format == f"low-rank-{format}":
                return weight
            made = pack_factors(weight, format, group_size)
            before, after = (w.factors[0].shape[2] for w in (weight, made))
            if before != after:
                padded.add((before, after))
            return made
        return (
            weight
            if weight.format == format
            else PackedWeight.encode(weight.decode(dtype=torch.float32), format, **options)
        )

    for layer, block in enumerate(model.blocks):
        experts = block.moe.experts
        mine = sorted(e for i, e in chosen if i == layer)
        replace_experts(experts, {e: [encoded(one(w, e)) for w in _weights(experts)] for e in mine})
    return ", ".join(f"rank {a} filled up with zeros to {b}, whole groups" for a, b in sorted(padded))
