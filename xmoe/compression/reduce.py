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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xmoe.compression.identity import model_hash
from xmoe.compression.layerwise import Batch, as_batches
from xmoe.compression.low_rank import Packing, Place, choose_ranks, factor_experts, replace_experts
from xmoe.compression.magnitude import SCOPES, SCORES, input_norms, prune_magnitude
from xmoe.compression.neurons import cut_neurons, neurons_to_keep
from xmoe.compression.reduction_report import Stage, expert_stacks
from xmoe.compression.routing import RoutingStats, record_routing
from xmoe.errors import ConfigError, DataError
from xmoe.model.config import ModelConfig
from xmoe.model.transformer import Transformer
from xmoe.quantization.compound import Stack, pack_factors, rank_unit
from xmoe.quantization.packed import PackedWeight, one

METHODS = ("magnitude", "neurons", "low-rank", "int8", "int4", "mxfp4")
QUANTIZED = ("int8", "int4", "mxfp4")
SAMPLE = 512
"""Tokens on which output errors are measured where only text was given."""

_ALIASES = {"svd": "low-rank", "rank": "low-rank", "lowrank": "low-rank", "prune": "magnitude", "sparsity": "magnitude"}


@dataclass(frozen=True)
class Job:
    """A sequence of methods and what is asked of them; the fields are the arguments of :func:`reduce`.

    Raises:
        ConfigError: an unknown method, score or scope, a fraction outside (0, 1), a pattern that is none.
    """

    methods: Sequence[str]
    fraction: float | None = None
    scope: str | None = None
    score: str = "magnitude"
    pattern: tuple[int, int] | None = None
    group_size: int = 32
    rank: tuple[int, int] | None = None
    whiten: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(_method(m) for m in self.methods))
        object.__setattr__(self, "scope", self.scope or ("tensor" if self.score == "magnitude" else "row"))
        _check(self.methods, self.fraction, self.scope, self.score, self.pattern, self.rank)

    def looks_at_inputs(self, at: int) -> bool:
        """Whether method number `at` asks what the experts are fed, all of the text if there is any."""
        method = self.methods[at]
        return (method == "low-rank" and self.whiten) or (method == "magnitude" and self.score != "magnitude")

    def check_inputs(self, given: bool) -> None:
        """ConfigError where a method asks what experts are fed and nothing tells."""
        if (self.whiten or self.score != "magnitude") and not given:
            asks = "--whiten" if self.whiten else f"the score {self.score}"
            raise ConfigError(f"{asks} looks at what experts are fed; give --data, or --stats recorded with --sample")

    def packing(self, at: int) -> Packing | None:
        """The packing that what method number `at` makes will meet with, before the same method comes again.

        Sizes then suit its groups, and no byte goes into filling them up.
        """
        first, *later = self.methods[at:]
        later = later[: later.index(first)] if first in later else later
        formats = [m for m in later if m in QUANTIZED]
        unit = max((rank_unit(m, self.group_size) for m in formats), default=1)
        return Packing(formats[-1], self.group_size, unit) if formats else None

    def ranks(self, at: int, model: Transformer, chosen: Collection[Place]) -> dict[Place, tuple[int, int]]:
        """Ranks for method number `at`, which is low-rank; a ConfigError where they save nothing."""
        return choose_ranks(model, chosen, self.fraction, self.rank, self.packing(at))

    def apply(
        self,
        at: int,
        before: Transformer,
        chosen: Collection[Place],
        sample: Tensor | None,
        text: Sequence[Batch] | None,
        fed: Tensor | None = None,
    ) -> tuple[Transformer, Any]:
        """A new model after method number `at`, and what there is to tell, for :meth:`said`.

        Args:
            sample: MoE inputs [layers, N, D] that neurons are scored on.
            text: what the experts are fed, for methods that look at it, as tokens to be sent through `before`.
            fed: the same as MoE inputs, where there is no text.
        """
        method, packing = self.methods[at], self.packing(at)
        if method == "neurons":
            keep = neurons_to_keep(before, self.fraction, packing.unit if packing else 1)
            return cut_neurons(before, keep, sample), None
        after = copy.deepcopy(before)
        inputs = {"sample": None if text else fed, "batches": text} if self.looks_at_inputs(at) else {}
        if method == "magnitude":
            norms = input_norms(after, self.score, **inputs) if inputs else None
            prune_magnitude(after, self.fraction, self.scope, self.pattern, chosen, norms)
            return after, None
        if method == "low-rank":
            return after, factor_experts(after, self.ranks(at, before, chosen), **inputs)
        return after, _quantize(after, method, self.group_size, chosen)

    def said(self, at: int, notes: Sequence[Any]) -> str:
        """In a few words what method number `at` chose, from the notes of all layers."""
        method = self.methods[at]
        if method == "magnitude":
            how = f"by {self.scope}" if self.pattern is None else f"{self.pattern[0]}:{self.pattern[1]}"
            return f"{self.score}, {how}"
        if method == "low-rank":
            lost = "; the zeros before it did not survive" if "magnitude" in self.methods[:at] else ""
            return sum(notes[1:], notes[0]).said() + lost
        if method in QUANTIZED:
            return ", ".join(
                f"rank {a} filled up with zeros to {b}, whole groups" for a, b in sorted(set().union(*notes))
            )
        return ""


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
    job = Job(methods, fraction, scope, score, pattern, group_size, rank, whiten)
    chosen = chosen_experts(job.methods, experts, model.config)
    if stats is not None and stats.model and stats.model != model_hash(model):
        raise DataError(f"the statistics are of model {stats.model}, this is model {model_hash(model)}")
    if job.methods[:1] == ("low-rank",):
        job.ranks(0, model, chosen)  # says no before any text is read
    sample = None if stats is None else stats.sample
    text = None if batches is None else list(as_batches(batches, model.device))
    job.check_inputs(sample is not None or text is not None)
    if sample is None and text is not None:
        sample = record_routing(model, text, sample=SAMPLE).sample
    small, stages = model, []
    for at, method in enumerate(job.methods):
        before = small
        small, note = job.apply(at, before, chosen, sample, text, sample)
        stages.append(Stage.of(method, before, small, model, sample)._replace(detail=job.said(at, [note])))
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


def chosen_experts(methods: Sequence[str], experts: Sequence[Place] | None, config: ModelConfig) -> Collection[Place]:
    """The experts to touch; a ConfigError where the choice is not possible for a method."""
    counts = [config.experts_in_layer(i) for i in range(config.num_hidden_layers)]
    if experts is None:
        return {(i, e) for i, n in enumerate(counts) for e in range(n)}
    for layer, e in experts:
        if not 0 <= layer < len(counts) or not 0 <= e < counts[layer]:
            raise ConfigError(f"experts {layer}:{e}: there is no such expert")
    if "neurons" in methods:
        raise ConfigError("neurons changes the width that all experts of the model share; leave --experts out")
    return set(experts)


# ------------------------------------------------------------------------------------------------------- quantization


def _quantize(model: Transformer, format: str, group_size: int, chosen: Collection[Place]) -> set[tuple[int, int]]:
    """Encode the weights of the experts `chosen`, in place, factors as factors; ranks that had to be filled up, and to what."""
    options = {"group_size": group_size} if format == "int4" else {}
    padded = set()

    def encoded(weight: Stack) -> Stack:
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
        replace_experts(experts, {e: [encoded(one(w, e)) for w in expert_stacks(experts)] for e in mine})
    return padded
