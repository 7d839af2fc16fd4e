"""Checkpoint <-> model: load, save, convert, and one layer at a time.

Reading is by memory map. On the CPU, tensors whose dtype is wanted as it is stored are views of the file: loading them
costs neither time nor memory until they are used. Everything else passes through one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from xmoe.checkpoint import adapters, export, sidecars
from xmoe.checkpoint.huge_pages import HugePageReader
from xmoe.checkpoint.layouts import LAYOUTS, SELECTION_BIAS, native_shapes
from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.projections import check_choice, in_int8, is_projection
from xmoe.checkpoint.shard_header import ALIGNMENT
from xmoe.data.tokenizer import Tokenizer
from xmoe.device import pick_device
from xmoe.errors import CheckpointError, ConfigError
from xmoe.model.config import ModelConfig
from xmoe.model.transformer import Block, Transformer
from xmoe.outputs import new_folder
from xmoe.quantization.packed import PackedWeight

_COPY_AT_MOST = 64 << 20

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Source(NamedTuple):
    """Where a model came from. `load` leaves it on the model as `model.source`, and `save` passes on what is in it."""

    folder: Path
    extra: dict[str, Any]
    """Keys of its config.json beyond the model's shape."""


# ---------------------------------------------------------------------------------------------------------- loading


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    experts: str = "mxfp4",
    adapter: str | Path | None = None,
    huge_pages: bool = False,
    projections: str = "stored",
) -> tuple[Transformer, Tokenizer | None]:
    """Open a checkpoint of any layout as a model, with its tokenizer (None where it has none).

    Args:
        path: a folder or a hub name.
        device: where the weights go, each straight from the file ("auto": the best device here).
        dtype: of everything that is not packed; "auto" keeps what is stored (float16 becomes float32).
        experts: "mxfp4" leaves packed experts as they are stored, whatever the format, and dense ones dense;
            "dense" decodes packed ones to `dtype`.
        adapter: a folder with an adapter of this model (:mod:`xmoe.checkpoint.adapters`), to be attached.
        huge_pages: on the CPU, read the weights into huge pages instead of leaving them mapped: decoding is faster, see
            `docs/decode_cpu.md`, loading slower. The embedding, of which few rows are read, stays mapped.
        projections: "int8" rounds attention's projections and the unembedding to 8 bits, on the CPU: decoding is faster,
            logits move a little (the same page has figures), and the model cannot be saved.

    Raises:
        CheckpointError: see :class:`~xmoe.checkpoint.opened.Checkpoint`; an adapter of another model.
        ConfigError: float16, an unknown device or an unknown choice.
    """
    device, wanted, decode = _choices(device, dtype, experts)
    rounds = check_choice(projections, device)
    checkpoint = Checkpoint(path)
    tokenizer = sidecars.load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)
    with torch.device("meta"):
        model = Transformer(checkpoint.config)
    huge = None
    stays = {name for name in checkpoint if rounds and is_projection(name)}
    stays |= set() if model.head is None else {"embed.weight"}
    if huge_pages and device.type == "cpu":
        leave = [stored for name in stays for stored in checkpoint.stored_names(name)]
        checkpoint.reader = huge = HugePageReader(checkpoint.folder, leave)
    with _progress("loading", checkpoint.reader.total_bytes) as bar:
        for name in checkpoint:
            value = _materialize(checkpoint, name, device, wanted, decode)
            if huge is not None and name not in stays:
                value = value.map(huge.settle) if isinstance(value, PackedWeight) else huge.settle(value)
                huge.release()  # pages that were only copied count as memory while they are mapped
            _place(model, name, value)
            bar.update(sum(checkpoint.reader[n].nbytes for n in checkpoint.stored_names(name)))
    for layer, block in enumerate(model.blocks):
        _place_selection_bias(checkpoint, layer, block, device)
    assert not any(t.is_meta for t in model.state_dict().values())
    model.source = Source(checkpoint.folder, checkpoint.extra)
    if adapter is not None:
        adapters.load(model, adapter)  # which knows its model by the weights as they are stored
    if rounds:
        _round(model, checkpoint)
    _prepare(model, device)
    return model.eval(), tokenizer


def _round(model: Transformer, checkpoint: Checkpoint) -> None:
    names = [name for name in checkpoint if is_projection(name)]
    for name in tqdm(names, desc="rounding", disable=None):
        module = model.get_submodule(name.rpartition(".")[0])
        module.pack("weight", in_int8(name, module.weight.detach()))
        checkpoint.reader.release()  # pages that were only read count as memory while they are mapped


def stream_layers(
    path: str | Path | Checkpoint,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    experts: str = "mxfp4",
) -> Iterator[Block]:
    """The blocks of a checkpoint, first to last, each loaded when it is asked for.

    Only what the caller keeps stays in memory. Arguments are those of :func:`load`; :func:`load_ends` has the rest.
    """
    device, wanted, decode = _choices(device, dtype, experts)
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(path)
    for layer in range(checkpoint.config.num_hidden_layers):
        prefix = f"blocks.{layer}."
        with torch.device("meta"):
            block = Block(checkpoint.config, layer)
        for name in checkpoint:
            if name.startswith(prefix):
                _place(block, name.removeprefix(prefix), _materialize(checkpoint, name, device, wanted, decode))
        _place_selection_bias(checkpoint, layer, block, device)
        _prepare(block, device)
        yield block.eval()
        del block
        checkpoint.reader.release()  # else the pages of all layers read so far would stay in memory


def load_ends(
    path: str | Path | Checkpoint, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto"
) -> Transformer:
    """The model without its blocks: embedding, final norm and unembedding are loaded, `blocks` is empty."""
    device, wanted, decode = _choices(device, dtype, "mxfp4")
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(path)
    with torch.device("meta"):
        model = Transformer(checkpoint.config)
    model.blocks = nn.ModuleList()
    for name in checkpoint:
        if not name.startswith("blocks."):
            _place(model, name, _materialize(checkpoint, name, device, wanted, decode))
    model.source = Source(checkpoint.folder, checkpoint.extra)
    return model.eval()


def native_weight(checkpoint: Checkpoint, name: str, dtype: str | torch.dtype = "auto") -> Tensor | PackedWeight:
    """A native tensor as :func:`load` holds it on the CPU; a balancing bias is float32 always."""
    if name not in checkpoint.rules:
        return checkpoint.weight(name).float()
    device, wanted, _ = _choices("cpu", dtype, "mxfp4")
    return _materialize(checkpoint, name, device, wanted, decode=False)


def wanted_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype that `dtype` names, None for "auto"; or a ConfigError."""
    if dtype in (torch.float16, "float16", "fp16", "half"):
        raise ConfigError(
            "float16 cannot run GPT-OSS: its residual stream grows to 45,000 and beyond, and float16 overflows at "
            "65,504 to infinity; choose bfloat16 or float32"
        )
    if dtype != "auto" and dtype not in _DTYPES and dtype not in _DTYPES.values():
        raise ConfigError(f"dtype {dtype} is unknown; choose auto, {' or '.join(_DTYPES)}")
    return None if dtype == "auto" else _DTYPES.get(dtype, dtype)


def _choices(device, dtype, experts) -> tuple[torch.device, torch.dtype | None, bool]:
    """device, dtype (None: as stored) and whether to decode, or a ConfigError."""
    wanted = wanted_dtype(dtype)
    if experts not in ("mxfp4", "dense"):
        raise ConfigError(f"experts={experts!r} is unknown; choose mxfp4 (packed, as stored) or dense")
    if not isinstance(device, torch.device):
        device = pick_device(device)
    return device, wanted, experts == "dense"


def _materialize(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype | None, decode: bool
) -> Tensor | PackedWeight:
    value = checkpoint.weight(name)
    if not isinstance(value, PackedWeight):
        return _aligned(value.to(device=device, dtype=dtype or _kept(value.dtype)).contiguous())
    if not decode:
        return (value if dtype is None else value.cast(dtype)).to(device)
    target = dtype or _kept(checkpoint.tensor_dtype())
    if device.type == "mps":  # decode on the CPU: the lookup needs integer types that MPS has only in part
        return value.decode(dtype=target).to(device)
    return value.to(device).decode(dtype=target)


def _kept(stored: torch.dtype) -> torch.dtype:
    """The dtype of "auto": as stored, or float32 where we do not compute in that one."""
    return stored if stored in _DTYPES.values() else torch.float32


def _aligned(tensor: Tensor) -> Tensor:
    """A copy where `tensor` is a view of the file at an odd address and not too large, else `tensor` itself.

    Products of tensors at odd addresses are slower and differ in the last bit, so a run that resumes would not be the
    run that never stopped. In files that we wrote only tensors of odd sizes are concerned.
    """
    if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT and tensor.nbytes <= _COPY_AT_MOST:
        return tensor.clone()
    return tensor


def _place(root: nn.Module, name: str, value: Tensor | PackedWeight) -> None:
    owner, _, leaf = name.rpartition(".")
    module = root.get_submodule(owner)
    if isinstance(value, PackedWeight):
        module.pack(leaf, value)
    else:
        setattr(module, leaf, nn.Parameter(value))


def _prepare(module: nn.Module, device: torch.device) -> None:
    """Put packed experts into the order of the CUDA kernels, now and in place: at first use it would be a second copy.

    Their bytes in a saved checkpoint stay the same. Nowhere but on CUDA is any of this imported.
    """
    if device.type == "cuda" and any(isinstance(m, PackedWeight) for m in module.modules()):
        from xmoe.kernels.cuda import backend

        if backend.reason(device, torch.bfloat16) is None:
            backend.prepare(module)


def _place_selection_bias(checkpoint: Checkpoint, layer: int, block: Block, device: torch.device) -> None:
    bias = checkpoint.selection_bias(layer)
    if bias is not None:
        block.moe.router.selection_bias = bias.to(device=device, dtype=torch.float32)


def _progress(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1000, disable=None)


# ----------------------------------------------------------------------------------------------------------- saving


def save(
    model: Transformer,
    folder: str | Path,
    layout: str = "native",
    tokenizer: Tokenizer | None = None,
    extra: Mapping[str, Any] | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    overwrite: bool = False,
) -> Path:
    """Write `model` as a checkpoint folder, whole or not at all.

    Dense experts become MXFP4 in the layouts that pack them (by the best-of-three rule), packed ones keep their bytes
    where the layout has their format and are decoded where it has not. Small files that stood beside the weights the
    model was loaded from (tokenizer, chat template, generation settings) come along.

    Args:
        layout: a key of :data:`xmoe.checkpoint.layouts.LAYOUTS`.
        tokenizer: written as tokenizer.json.
        extra: keys to add to config.json.
        dtype: of everything that is not packed; "auto" keeps the model's in the native layout and takes bfloat16,
            in which GPT-OSS is published, in the others.

    Raises:
        ConfigError: the layout cannot express the model (:func:`~xmoe.checkpoint.config_writing.check_expressible`), or
            `folder` holds something and `overwrite` is off.
    """
    values = _model_values(model)
    source = getattr(model, "source", None)
    return _write(
        model.config,
        values.__getitem__,
        [name for name in values if name not in native_shapes(model.config)],
        folder,
        layout,
        dtype,
        overwrite,
        tokenizer=tokenizer,
        extra={**(source.extra if source else {}), **(extra or {})},
        source=source.folder if source and source.folder.is_dir() else None,
    )


def convert(
    path: str | Path,
    folder: str | Path,
    layout: str,
    dtype: str | torch.dtype = "auto",
    overwrite: bool = False,
    adapter: str | Path | None = None,
) -> Path:
    """Write a checkpoint in another layout (or the same) without ever holding more than one expert's decoded weights.

    MXFP4 blocks and scales keep their bytes wherever both layouts have them. Arguments are those of :func:`save`; with
    an `adapter` of this checkpoint its changes are added to the weights, experts that have one are rounded to MXFP4
    again where the layout packs and dense where it does not, and merge.json says what rounding did to them.
    """
    checkpoint = Checkpoint(path)
    sidecars.load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)  # refused before anything is written
    if adapter is None:
        merge, value = None, checkpoint.weight
    else:
        merge = adapters.Merge(adapters.read(adapter, checkpoint.config, checkpoint.weight), checkpoint.config)
        types = checkpoint.tensor_dtype(), _choices("cpu", dtype, "dense")[1]

        def value(name: str) -> Tensor | PackedWeight:
            return merge.value(name, checkpoint.weight(name), *types)

    biases = [SELECTION_BIAS.format(i=i) for i in range(checkpoint.config.num_hidden_layers)]
    return _write(
        checkpoint.config,
        value,
        [name for name in biases if name in checkpoint.reader],
        folder,
        layout,
        dtype,
        overwrite,
        tokenizer=None,
        extra=checkpoint.extra,
        source=checkpoint.folder,
        merge=merge,
    )


def rewrite(
    checkpoint: Checkpoint,
    folder: str | Path,
    layout: str,
    config: ModelConfig,
    value: Callable[[str], Tensor | PackedWeight],
    dtype: str | torch.dtype = "auto",
) -> Path:
    """Write a checkpoint that has the small files of `checkpoint`, this `config`, and weights by their native names.

    One weight is in memory at a time. `value` is asked for the balancing biases that `checkpoint` has, too.
    """
    biases = [SELECTION_BIAS.format(i=i) for i in range(config.num_hidden_layers)]
    biases = [name for name in biases if name in checkpoint.reader]
    about = {"tokenizer": None, "extra": checkpoint.extra, "source": checkpoint.folder}
    return _write(config, value, biases, folder, layout, dtype, False, **about)


def _write(
    config: ModelConfig,
    value: Callable[[str], Tensor | PackedWeight],
    biases: list[str],
    folder: str | Path,
    layout: str,
    dtype: str | torch.dtype,
    overwrite: bool,
    *,
    tokenizer: Tokenizer | None,
    extra: Mapping[str, Any],
    source: Path | None,
    merge: adapters.Merge | None = None,
) -> Path:
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}; choose {', '.join(LAYOUTS)}")
    _, wanted, _ = _choices("cpu", dtype, "dense")
    encode = {} if merge is None else {"encode": merge.encode}
    plan = export.Plan(config, LAYOUTS[layout], value, biases, wanted, **encode)
    with new_folder(folder, overwrite=overwrite) as partial:
        with _progress("writing", plan.total_bytes) as bar:
            plan.write(partial, bar.update)
        export.write_small_files(partial, plan, tokenizer, extra, source)
        if merge is not None:
            merge.write(partial)
    return Path(folder)


def _model_values(model: Transformer) -> dict[str, Tensor | PackedWeight]:
    """All native tensors of a model by name, or a ConfigError where it holds something that would be lost."""
    values: dict[str, Tensor | PackedWeight] = dict(model.named_parameters())
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedWeight)}
    packed = {name: m for name, m in packed.items() if name.rpartition(".")[0] not in packed}  # not those within others
    values |= packed
    for layer, block in enumerate(model.blocks):
        router = block.moe.router
        if router.kept is not None:
            raise ConfigError(
                f"layer {layer} has a pruning plan on trial, which a checkpoint cannot hold; "
                "cut it with prune(), or lift it with router.keep_only(None)"
            )
        if router.selection_bias is not None:
            values[SELECTION_BIAS.format(i=layer)] = router.selection_bias
    if rounded := [name for name in packed if is_projection(name)]:
        raise ConfigError(
            f"{rounded[0]} is held in int8, for which no layout has a place; load the model without projections='int8' to save it"
        )
    expected = native_shapes(model.config)
    known = set(expected) | {SELECTION_BIAS.format(i=i) for i in range(len(model.blocks))}
    known |= {f"{name}.{t}" for name, weight in packed.items() for t in weight.tensors}
    if unknown := [n for n in {**values, **model.state_dict()} if n not in known]:
        raise ConfigError(f"the model has tensors that no layout has a name for ({unknown[0]}); merge adapters first")
    wrong = [n for n, shape in expected.items() if n not in values or tuple(values[n].shape) != shape]
    if wrong:
        raise CheckpointError(f"the model does not fit its own config: {wrong[0]} is missing or of another shape")
    return values
