"""Reduce a checkpoint that need not fit in memory: one layer is read, goes through all methods, and is set aside.

What comes out has the bytes of :func:`~xmoe.compression.reduce.reduce` on the whole model. A layer is looked at as a model
of one block. Where methods look at what experts are fed, the text waits between layers once for each of them, as it comes
out of the layers before as *that* method finds them.

Two questions need all layers at once, and then the model is loaded whole: the least weights of all layers (`global`), and
how many neurons of layers that differ in form make up a fraction of the bytes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from xmoe.checkpoint import forms
from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.shard_reader import ShardReader
from xmoe.checkpoint.shard_writer import ShardWriter
from xmoe.checkpoint.weights import load, native_weight, rewrite, stream_layers
from xmoe.compression.changed import save_changed, write_changed
from xmoe.compression.identity import hash_of
from xmoe.compression.layerwise import Batch, Visit, as_batches, return_freed_memory, walk
from xmoe.compression.low_rank import Place
from xmoe.compression.reduce import SAMPLE, Job, chosen_experts, reduce
from xmoe.compression.reduction_report import Stage
from xmoe.compression.routing import RoutingStats, embedded, record_checkpoint
from xmoe.errors import DataError
from xmoe.model.experts import Experts
from xmoe.model.transformer import Block, Transformer
from xmoe.outputs import check_free
from xmoe.quantization.packed import PackedWeight

_EXPERTS = "blocks.{layer}.moe.experts.{name}"


def reduce_checkpoint(
    source: str | Path,
    destination: str | Path,
    methods: Sequence[str],
    fraction: float | None = None,
    *,
    experts: Sequence[Place] | None = None,
    stats: RoutingStats | None = None,
    batches: Iterable | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    command: str = "",
    overwrite: bool = False,
    **options: Any,
) -> list[Stage]:
    """Write the checkpoint `source` with smaller experts to `destination`; the report of :func:`reduce`.

    Args:
        device, dtype: as for :func:`~xmoe.checkpoint.weights.load`.
        options: `scope`, `score`, `pattern`, `group_size`, `rank` and `whiten` of :func:`reduce`; it has the other ones, too.

    Raises:
        ConfigError, DataError: as :func:`reduce`; nothing is written then.
    """
    check_free(destination, overwrite)
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    job = Job(methods, fraction, **options)
    chosen = chosen_experts(job.methods, experts, checkpoint.config)
    about = {"command": command, "overwrite": overwrite}
    if _needs_all_layers(job, checkpoint):
        model, _ = load(checkpoint.folder, device, dtype)
        given = {"experts": experts, "stats": stats, "batches": batches, **options}
        small, stages = reduce(model, methods, fraction, **given)
        save_changed(small, checkpoint.folder, destination, operations(stages, fraction), **about)
        return stages
    model_hash = hash_of(checkpoint.config, checkpoint.weight)
    if stats is not None and stats.model and stats.model != model_hash:
        raise DataError(f"the statistics are of model {stats.model}, this is model {model_hash}")
    sample = None if stats is None else stats.sample
    job.check_inputs(sample is not None or batches is not None)
    layers = _Layers(checkpoint, job, chosen, device, dtype)
    if job.methods[:1] == ("low-rank",):
        layers.check_ranks()  # says no before any text is read
    text = None if batches is None else list(as_batches(batches, device))
    if sample is None and text is not None:
        sample = record_checkpoint(checkpoint, text, sample=SAMPLE, device=device, dtype=dtype).sample
    with _set_aside(destination) as aside:
        stages = layers.run(sample, text, aside)
        held = {f for form in layers.forms.values() for f in form.formats}

        def write(folder: Path, layout: str) -> None:
            rewrite(checkpoint, folder, layout, layers.config, layers.value)

        write_changed(checkpoint, destination, operations(stages, fraction), held, write, **about)
    return stages


def operations(stages: Sequence[Stage], fraction: float | None) -> list[dict[str, Any]]:
    """The stages as the manifest has them."""
    return [{"name": "reduce", "fraction": fraction, **stage._asdict()} for stage in stages]


def _needs_all_layers(job: Job, checkpoint: Checkpoint) -> bool:
    """Whether a method asks what no layer knows by itself."""
    if "magnitude" in job.methods and job.scope == "global" and job.pattern is None:
        return True
    kinds = set()
    for name, form in checkpoint.forms.items():
        if form.format == "mixed":
            kinds |= {name}
        stored = [(n.removeprefix(name), shape[1:], checkpoint.reader[n].dtype) for n, shape in form.expected.items()]
        kinds |= {(name.rpartition(".")[2], *sorted(stored, key=str))}
    return "neurons" in job.methods and len(kinds) > 2  # gate_up's and down's


@contextlib.contextmanager
def _set_aside(destination: str | Path) -> Iterator[Path]:
    """A folder beside the output, gone when the block ends."""
    goal = Path(destination)
    goal.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{goal.name}.", suffix=".partial", dir=goal.parent))
    try:
        yield folder
    except OSError as e:
        if e.errno and str(folder) in str(e.filename or folder):  # a name that the user gave, not ours
            e.filename = str(destination)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Layers:
    """The layers of a checkpoint on their way through a job.

    Attributes (after :meth:`run`):
        config: of the result. forms: native name -> form, of every expert weight set aside.
    """

    def __init__(self, checkpoint: Checkpoint, job: Job, chosen: Collection[Place], device, dtype):
        self.checkpoint, self.job, self.config = checkpoint, job, checkpoint.config
        self.forms: dict[str, forms.Form] = {}
        self._device, self._dtype = torch.device(device), dtype
        self._readers: list[ShardReader] = []
        self._open = 0
        self._chosen = [{(0, e) for i, e in chosen if i == layer} for layer in range(self.config.num_hidden_layers)]

    def check_ranks(self) -> None:
        """ConfigError where the first method is low-rank and a rank saves nothing; reads no weight."""
        for layer, block in enumerate(stream_layers(self.checkpoint)):
            self.job.ranks(0, self._alone(block, layer), self._chosen[layer])

    @torch.no_grad()
    def run(self, sample: Tensor | None, text: list[Batch] | None, aside: Path) -> list[Stage]:
        """Put every layer through all methods and write it to `aside`; the report."""
        count, job = self.config.num_hidden_layers, self.job
        waiting = {at: self._embed(text) for at in range(len(job.methods)) if text and job.looks_at_inputs(at)}
        stages: list[Stage | None] = [None] * len(job.methods)
        notes: list[list[Any]] = [[] for _ in job.methods]
        layers = stream_layers(self.checkpoint, self._device, self._dtype)
        for layer, block in enumerate(tqdm(layers, total=count, desc="reducing layers", disable=None)):
            mine = None if sample is None else sample[layer : layer + 1]
            start = before = self._alone(block, layer)
            for at, method in enumerate(job.methods):
                fed = self._through(before.blocks[0], waiting[at], text) if at in waiting else mine
                after, note = job.apply(at, before, self._chosen[layer], mine, None, fed)
                stage = Stage.of(method, before, after, start, mine)
                stages[at] = stage if stages[at] is None else stages[at].joined(stage)
                notes[at].append(note)
                before = self._alone(_with_experts(before.blocks[0], after.blocks[0].moe.experts), layer)
            self._set_aside(layer, before.blocks[0].moe.experts, aside / str(layer))
            del block, start, before, after
            return_freed_memory()
        width = {form.shape[2] for name, form in self.forms.items() if name.endswith(".down")}
        assert len(width) == 1, width
        self.config = dataclasses.replace(self.config, intermediate_size=width.pop())
        return [stage._replace(detail=job.said(at, notes[at])) for at, stage in enumerate(stages)]

    def value(self, name: str) -> Tensor | PackedWeight:
        """The native tensor `name` of the result."""
        if ".moe.experts." not in name:
            return native_weight(self.checkpoint, name, self._dtype)
        layer = int(name.split(".")[1])
        if layer != self._open:  # pages of layers that were read count as memory while they are mapped
            self._readers[self._open].release()
            self.checkpoint.reader.release()
            self._open = layer
        reader = self._readers[layer]
        return forms.read_weight(reader, self.forms[name]) if name in self.forms else reader.tensor(name)

    def _alone(self, block: Block, layer: int) -> Transformer:
        """A model of this block alone, to be looked at and not to be run."""
        counts = self.config.experts_in_layer(layer)
        width = block.moe.experts.down.shape[2]
        types = {"layer_types": (self.config.layer_types[layer],)}
        config = dataclasses.replace(
            self.config,
            num_hidden_layers=1,
            num_experts=counts,
            intermediate_size=width,
            reasoning_effort=None,
            **types,
        )
        with torch.device("meta"):
            model = Transformer(config)
        model.blocks = nn.ModuleList([block])
        model.embed.weight = nn.Parameter(torch.empty(0, config.hidden_size, device=self._device))  # says where it is
        return model.eval()

    def _embed(self, text: list[Batch]) -> list[Tensor]:
        return [embedded(self.checkpoint, batch.tokens, self._device, self._dtype) for batch in text]

    def _through(self, block: Block, hidden: list[Tensor], text: list[Batch]) -> Tensor:
        """Send the text on through `block`, and what its experts are fed [1, N, D]."""
        seen: list[Tensor] = []

        def visit(layer: int, block: Block, visits: Iterator[Visit]) -> None:
            seen.extend(v.inputs for v in visits)

        walk(self.config, hidden, [block], text, visit, norms=False)
        return torch.cat(seen).unsqueeze(0)

    def _set_aside(self, layer: int, experts: Experts, folder: Path) -> None:
        folder.mkdir()
        tensors: dict[str, Tensor] = {}
        for name in ("gate_up", "gate_up_bias", "down", "down_bias"):
            held, full = getattr(experts, name), _EXPERTS.format(layer=layer, name=name)
            tensors |= (
                {f"{full}.{n}": t for n, t in held.tensors.items()}
                if isinstance(held, PackedWeight)
                else {full: held.data}
            )
        with ShardWriter(folder, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}) as writer:
            for name, tensor in tensors.items():
                writer.append(name, tensor)
        self._readers.append(ShardReader(folder))
        for name in ("gate_up", "down"):
            full = _EXPERTS.format(layer=layer, name=name)
            self.forms[full] = forms.read_form(self._readers[-1], full, tuple(getattr(experts, name).shape))


def _with_experts(block: Block, experts: Experts) -> Block:
    """A copy of `block` that has these experts."""
    return copy.deepcopy(block, {id(block.moe.experts): experts})
