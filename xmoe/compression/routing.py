"""Watch: RoutingStats, the sums from which every activation criterion follows, from one pass over routed tokens.

For layer l and expert e let X be the tokens routed to e, g the weight its output is multiplied with, and r the length
||f_e(x)||_2 of that output before weighting, down bias included. The moments, each float64 [layers, experts], are

    count             |X|                     weight            sum g
    norm              sum r                   norm_sq           sum r^2
    weighted_norm     sum g r                 weighted_norm_sq  sum g^2 r^2
    max_norm          max r                   probability       sum over ALL tokens of softmax(logits)_e

All but the maximum are sums, so statistics of two texts are added, and nothing depends on how tokens were batched.
`max_norm` stands in for the largest element, which dominates the length where it is extreme (max|f| <= r).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.shard_header import TensorInfo
from xmoe.checkpoint.weights import stream_layers
from xmoe.compression.identity import hash_of, model_hash
from xmoe.compression.layerwise import Batch, Visit, as_batches, real_routing, walk
from xmoe.device import pick_dtype
from xmoe.errors import DataError
from xmoe.model.router import Routing
from xmoe.model.transformer import Block, Transformer
from xmoe.outputs import new_file

SCHEMA_VERSION = 1
SUMS = ("count", "weight", "norm", "norm_sq", "weighted_norm", "weighted_norm_sq", "probability")
MOMENTS = (*SUMS, "max_norm")


class LayerMoments(NamedTuple):
    """The moments of one layer, float64 [E] each (see the module's page), and the number of tokens behind them."""

    count: Tensor
    weight: Tensor
    norm: Tensor
    norm_sq: Tensor
    weighted_norm: Tensor
    weighted_norm_sq: Tensor
    probability: Tensor
    max_norm: Tensor
    tokens: float
    num_experts_per_tok: int


@dataclasses.dataclass
class RoutingStats:
    """Sums by (layer, expert) over real tokens; add two together, save, load.

    Attributes:
        moments: name -> float64 [layers, experts]; layers with fewer experts than the largest are filled with zeros.
            Imported statistics may lack some.
        num_experts: experts of each layer.
        num_experts_per_tok: the K the tokens were routed with.
        tokens: real tokens seen.
        domain, data: what the text was, in a word; sha256 of the token ids of each recording added up here.
        model: hash of the model (see :mod:`xmoe.compression.identity`); empty where it is not known.
        sample: MoE inputs of some tokens, [layers, N, D], or None. Criteria that ask what the experts that were not
            chosen would have said need them, and so do merging and whitened reduction.
    """

    moments: dict[str, Tensor]
    num_experts: tuple[int, ...]
    num_experts_per_tok: int
    tokens: float = 0.0
    domain: str = ""
    data: tuple[str, ...] = ()
    model: str = ""
    sample: Tensor | None = None

    @classmethod
    def empty(cls, num_experts: Iterable[int], num_experts_per_tok: int, model: str = "") -> RoutingStats:
        """Statistics of no tokens."""
        counts = tuple(num_experts)
        zeros = {name: torch.zeros(len(counts), max(counts), dtype=torch.float64) for name in MOMENTS}
        return cls(zeros, counts, num_experts_per_tok, model=model)

    @property
    def num_layers(self) -> int:
        return len(self.num_experts)

    def layer(self, layer: int) -> LayerMoments:
        """The moments of one layer; DataError names those that imported statistics lack only when they are used."""
        E = self.num_experts[layer]
        missing = torch.full((E,), float("nan"), dtype=torch.float64)
        rows = {name: self.moments[name][layer, :E] if name in self.moments else missing for name in MOMENTS}
        return LayerMoments(**rows, tokens=self.tokens, num_experts_per_tok=self.num_experts_per_tok)

    def observe(self, layer: int, routing: Routing) -> None:
        """Take in what one layer's router decided for some tokens, all of them real; needs `output_norm`.

        An index of -1 marks a slot that is not used. The sums run in float64.
        """
        if routing.output_norm is None:
            raise DataError("routing without output norms cannot be recorded; call the model with norms=True")
        E = self.num_experts[layer]
        where = "cpu" if routing.indices.device.type == "mps" else routing.indices.device  # MPS has no float64
        index = routing.indices.reshape(-1).to(where)
        g, r = (t.detach().reshape(-1).to(where).double() for t in (routing.weights, routing.output_norm))
        if bool((used := index >= 0).logical_not().any()):
            index, g, r = index[used], g[used], r[used]
        gr = g * r
        sums = {
            "count": None, "weight": g, "norm": r, "norm_sq": r * r, "weighted_norm": gr, "weighted_norm_sq": gr * gr,
        }  # fmt: skip
        for name, values in sums.items():
            self.moments[name][layer, :E] += torch.bincount(index, values, minlength=E).double().cpu()
        largest = torch.zeros(E, dtype=torch.float64, device=r.device).scatter_reduce_(0, index, r, "amax")
        row = self.moments["max_norm"][layer, :E]
        torch.maximum(row, largest.cpu(), out=row)
        shares = routing.logits.detach().to(where).softmax(-1).double().sum(0)
        self.moments["probability"][layer, :E] += shares.cpu()

    def never_routed(self) -> list[tuple[int, int]]:
        """(layer, expert) of every expert that no token visited."""
        count = self.moments["count"]
        return [(i, e) for i, E in enumerate(self.num_experts) for e in range(E) if count[i, e] == 0]

    def __add__(self, other: RoutingStats) -> RoutingStats:
        """Statistics of both texts together; DataError unless both are of the same model."""
        if self.num_experts != other.num_experts or self.num_experts_per_tok != other.num_experts_per_tok:
            raise DataError(
                f"statistics of different shapes cannot be added: {_shape(self)} and {_shape(other)}; "
                "record both on the same model"
            )
        if self.model and other.model and self.model != other.model:
            raise DataError(
                f"statistics of different models cannot be added: model {self.model} and model {other.model}"
            )
        shared = [name for name in MOMENTS if name in self.moments and name in other.moments]
        added = {name: self.moments[name] + other.moments[name] for name in shared}
        if "max_norm" in added:
            added["max_norm"] = torch.maximum(self.moments["max_norm"], other.moments["max_norm"])
        samples = [s for s in (self.sample, other.sample) if s is not None]
        return RoutingStats(
            moments=added,
            num_experts=self.num_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            tokens=self.tokens + other.tokens,
            domain="+".join(dict.fromkeys(d for d in (*self.domain.split("+"), *other.domain.split("+")) if d)),
            data=(*self.data, *other.data),
            model=self.model or other.model,
            sample=torch.cat(samples, dim=1) if samples else None,
        )

    # ------------------------------------------------------------------------------------------------ on disk

    def save(self, path: str | Path, overwrite: bool = False, command: str = "") -> None:
        """Write one safetensors file: a float64 tensor a moment, and where they come from in its metadata."""
        from safetensors.torch import save_file

        tensors = {name: t.contiguous() for name, t in self.moments.items()}
        if self.sample is not None:
            tensors["sample"] = self.sample.contiguous()
        about = {
            "kind": "xmoe routing statistics", "schema_version": str(SCHEMA_VERSION), "model": self.model,
            "num_experts": json.dumps(self.num_experts), "num_experts_per_tok": str(self.num_experts_per_tok),
            "tokens": repr(self.tokens), "domain": self.domain, "data": json.dumps(self.data), "command": command,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip
        with new_file(path, overwrite) as partial:
            save_file(tensors, partial, metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> RoutingStats:
        """Read what :meth:`save` wrote; DataError where the file is missing, damaged or something else."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise DataError(f"statistics file {path} does not exist; scripts/compress.py record makes one")
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as e:
            raise DataError(f"{path} is no safetensors file ({e}); expected what compress.py record writes") from None
        if about.get("kind") != "xmoe routing statistics":
            raise DataError(f"{path} holds {', '.join(sorted(tensors)[:3]) or 'nothing'}, not routing statistics")
        if int(about["schema_version"]) > SCHEMA_VERSION:
            raise DataError(f"{path} has schema {about['schema_version']}; this xmoe reads up to {SCHEMA_VERSION}")
        sample = tensors.pop("sample", None)
        counts = tuple(json.loads(about["num_experts"]))
        wrong = [n for n, t in tensors.items() if t.shape != (len(counts), max(counts)) or n not in MOMENTS]
        if wrong:
            raise DataError(f"{path}: tensor {wrong[0]} {list(tensors[wrong[0]].shape)} does not belong there")
        return cls(
            moments=tensors,
            num_experts=counts,
            num_experts_per_tok=int(about["num_experts_per_tok"]),
            tokens=float(about["tokens"]),
            domain=about["domain"],
            data=tuple(json.loads(about["data"])),
            model=about["model"],
            sample=sample,
        )


def _shape(stats: RoutingStats) -> str:
    return f"{stats.num_layers} layers of {max(stats.num_experts)} experts, {stats.num_experts_per_tok} a token"


# ---------------------------------------------------------------------------------------------------------- recording


class DataHash:
    """sha256 over the real token ids, row after row: the same for any batch size and padding."""

    def __init__(self):
        self._digest = hashlib.sha256()
        self.tokens = 0

    def update(self, batch: Batch) -> None:
        for i, row in enumerate(batch.tokens):
            real = row if batch.mask is None else row[batch.mask[i]]
            self._digest.update(real.cpu().numpy().astype("<i8").tobytes() + b"|")
            self.tokens += real.numel()

    def require_tokens(self) -> None:
        if not self.tokens:
            raise DataError("no tokens to record: the batches are empty or all padding; give more text")

    def hexdigest(self) -> str:
        return self._digest.hexdigest()[:16]


class TokenSample:
    """A uniform sample of `size` real tokens of a stream whose length is not known: those with the smallest keys.

    Keys are drawn token by token from one seed, so the choice does not depend on batches, and is the same in all layers.
    """

    def __init__(self, size: int, layers: int, seed: int = 0):
        self.size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.zeros(0, dtype=torch.float64)
        self._rows: list[Tensor | None] = [None] * layers

    def choose(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Of the next `tokens` tokens those that enter; then, of those inside, which stay. One call a batch."""
        keys = torch.cat((self._keys, torch.rand(tokens, generator=self._generator, dtype=torch.float64)))
        limit = float(keys.kthvalue(self.size).values) if keys.numel() > self.size else float("inf")
        held = len(self._keys)
        staying = (keys <= limit).nonzero().squeeze(-1)
        self._keys = keys[staying]
        entering = staying[staying >= held] - held
        kept = staying[staying < held]
        return entering, torch.cat((kept, torch.arange(held, held + len(entering))))

    def add(self, layer: int, inputs: Tensor, choice: tuple[Tensor, Tensor]) -> None:
        """Take in one layer's inputs [T, D] of the tokens that `choose` was called for."""
        entering, staying = choice
        new = inputs.detach()[entering.to(inputs.device)].cpu()
        old = self._rows[layer]
        self._rows[layer] = new if old is None else torch.cat((old, new))[staying]

    def tensor(self) -> Tensor:
        """[layers, N, D], N the size or all tokens where there were fewer."""
        return torch.stack([rows for rows in self._rows if rows is not None])


@torch.no_grad()
def record_routing(
    model: Transformer,
    batches: Iterable,
    *,
    domain: str = "",
    sample: int = 0,
    seed: int = 0,
) -> RoutingStats:
    """One pass of `batches` through a model in memory -> :class:`RoutingStats`.

    Only routed (token, expert) pairs are computed, as in any forward pass, and no logits over the vocabulary are.

    Args:
        batches: token ids [B, S], or (tokens, mask) pairs, or objects with `.tokens` and `.mask` (True: a real token).
        domain: what the text is, in a word; kept with the statistics.
        sample: also keep the MoE inputs of this many tokens, drawn uniformly with `seed`.

    Raises:
        DataError: no real token in any batch.
    """
    config = model.config
    counts = [config.experts_in_layer(i) for i in range(config.num_hidden_layers)]
    stats = RoutingStats.empty(counts, config.num_experts_per_tok, model=model_hash(model))
    stats.domain = domain
    seen = DataHash()
    chosen = TokenSample(sample, stats.num_layers, seed) if sample else None
    was_training = model.training
    model.eval()
    try:
        total = len(batches) if hasattr(batches, "__len__") else None
        for batch in tqdm(as_batches(batches, model.device), total=total, desc="recording", disable=None):
            seen.update(batch)
            if chosen is None:
                routing = model.features(batch.tokens, positions=batch.positions, norms=True).routing
                for layer, decided in enumerate(routing):
                    stats.observe(layer, real_routing(decided, batch.mask))
            else:
                choice = chosen.choose(batch.real_tokens)
                walk(config, [model.embed(batch.tokens)], model.blocks, [batch], observer(stats, chosen, [choice]))
    finally:
        model.train(was_training)
    return finish(stats, seen, chosen)


@torch.no_grad()
def record_checkpoint(
    source: str | Path | Checkpoint,
    batches: Iterable,
    *,
    domain: str = "",
    sample: int = 0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
) -> RoutingStats:
    """As :func:`record_routing` on a checkpoint that need not fit in memory: one layer, packed, at a time.

    All batches wait between layers, so memory is one layer's weights and [tokens, D] activations. The unembedding is
    never read.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    config = checkpoint.config
    counts = [config.experts_in_layer(i) for i in range(config.num_hidden_layers)]
    stats = RoutingStats.empty(counts, config.num_experts_per_tok, model=hash_of(config, checkpoint.weight))
    stats.domain = domain
    waiting = list(as_batches(batches, device))
    seen = DataHash()
    for batch in waiting:
        seen.update(batch)
    seen.require_tokens()
    chosen = TokenSample(sample, stats.num_layers, seed) if sample else None
    choices = [chosen.choose(batch.real_tokens) for batch in waiting] if chosen else []
    layers = stream_layers(checkpoint, device, dtype)
    layers = tqdm(layers, total=stats.num_layers, desc="recording layers", disable=None)
    hidden = [embedded(checkpoint, batch.tokens, device, dtype) for batch in waiting]
    walk(config, hidden, layers, waiting, observer(stats, chosen, choices))
    return finish(stats, seen, chosen)


def embedded(checkpoint: Checkpoint, tokens: Tensor, device: str | torch.device, dtype: str | torch.dtype) -> Tensor:
    """Embeddings [B, S, D] of tokens, on `device`, in `dtype` (auto: as stored), by their rows on disk."""
    info = checkpoint.reader[checkpoint.stored_names("embed.weight")[0]]
    compute = info.dtype if dtype == "auto" else pick_dtype(str(dtype).removeprefix("torch."), torch.device(device))
    return _embed(info, tokens).to(device, compute)


def _embed(embedding: TensorInfo, tokens: Tensor) -> Tensor:
    """Rows of an embedding on disk. Read, not mapped: a mapping would keep most of the table's pages in memory."""
    ids, places = tokens.cpu().unique(return_inverse=True)
    rows = bytearray(len(ids) * embedding.row_bytes)
    with open(embedding.file, "rb", buffering=0) as file:
        for i, row in enumerate(ids.tolist()):
            file.seek(embedding.start + row * embedding.row_bytes)
            file.readinto(memoryview(rows)[i * embedding.row_bytes : (i + 1) * embedding.row_bytes])
    return torch.frombuffer(rows, dtype=embedding.dtype).view(len(ids), -1)[places]


def observer(stats: RoutingStats, sample: TokenSample | None, choices: list[tuple[Tensor, Tensor]]):
    """The visitor for :func:`~xmoe.compression.layerwise.walk` that fills `stats` and `sample`; one choice a batch."""

    def visit(layer: int, block: Block, visits: Iterable[Visit]) -> None:
        for seen in visits:
            stats.observe(layer, seen.routing)
            if sample is not None:
                sample.add(layer, seen.inputs, choices[seen.batch])

    return visit


def finish(stats: RoutingStats, seen: DataHash, sample: TokenSample | None) -> RoutingStats:
    """Write into `stats` what was seen."""
    seen.require_tokens()
    stats.tokens, stats.data = float(seen.tokens), (seen.hexdigest(),)
    stats.sample = None if sample is None else sample.tensor()
    return stats
