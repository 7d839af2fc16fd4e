"""What each layout calls the model's tensors: tables that work in both directions.

native     our own parameter names; experts in any format of xmoe.quantization; expert counts may differ by layer
hf-mxfp4   Hugging Face's gpt_oss with packed experts: the published root folder, what vLLM, llama.cpp and mlx-lm read
hf-bf16    Hugging Face's gpt_oss with dense experts, transposed to [E, in, out]
openai     the published `original/` folder, experts packed

A :class:`Rule` ties one native tensor to the foreign tensors that hold the same numbers. There are four kinds:
    same        one tensor, byte for byte
    rows        several tensors, which are row ranges of the native one (q, k and v of the fused qkv)
    packed      blocks and scales of an MXFP4 weight
    transposed  the native [E, out, in] stored as [E, in, out]
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from xmoe.checkpoint.wording import few
from xmoe.errors import CheckpointError
from xmoe.model.config import ModelConfig
from xmoe.quantization.mxfp4 import GROUP
from xmoe.quantization.packed import FORMATS, PackedWeight

_FEW = 5  # names that a message shows


class Rule(NamedTuple):
    """One native tensor and the foreign ones that hold it; `{i}` stands for the layer."""

    native: str
    foreign: tuple[str, ...]
    kind: Literal["same", "rows", "packed", "transposed"] = "same"


class Layout(NamedTuple):
    """The table of one layout."""

    name: str
    top: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    experts: str | None
    """The one format its experts have ("mxfp4" or "dense"); None where any format may stand."""
    shard_name: str = "model-{number:05d}-of-{count:05d}.safetensors"

    def rules(self, config: ModelConfig) -> Iterable[Rule]:
        """All rules of a model, layer by layer, as one would read it: embedding, blocks, norm, unembedding."""
        yield self.top[0]
        for i in range(config.num_hidden_layers):
            for rule in self.layer:
                yield Rule(rule.native.format(i=i), tuple(name.format(i=i) for name in rule.foreign), rule.kind)
        for rule in self.top[1:]:
            if not (rule.native == "head.weight" and config.tie_word_embeddings):
                yield rule


EXPERT_WEIGHTS = ("gate_up", "down")
"""The expert tensors that may be packed; their biases never are."""

SELECTION_BIAS = "blocks.{i}.moe.router.selection_bias"
"""A tensor that native checkpoints have after training with auxiliary-loss-free balancing; no other layout can say it."""

# The tables: native name, kind, foreign names. Rows stand in the order in which a model is read.

_NATIVE_LAYER = (
    "attn_norm.weight", "attn.qkv.weight", "attn.qkv.bias", "attn.sinks", "attn.out.weight", "attn.out.bias",
    "moe_norm.weight", "moe.router.weight", "moe.router.bias", "moe.experts.gate_up", "moe.experts.gate_up_bias",
    "moe.experts.down", "moe.experts.down_bias",
)  # fmt: skip

_HF_TOP = (
    ("embed.weight", "same", "model.embed_tokens.weight"),
    ("norm.weight", "same", "model.norm.weight"),
    ("head.weight", "same", "lm_head.weight"),
)
_HF_LAYER = (
    ("attn_norm.weight", "same", "input_layernorm.weight"),
    ("attn.qkv.weight", "rows", "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ("attn.qkv.bias", "rows", "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    ("attn.sinks", "same", "self_attn.sinks"),
    ("attn.out.weight", "same", "self_attn.o_proj.weight"),
    ("attn.out.bias", "same", "self_attn.o_proj.bias"),
    ("moe_norm.weight", "same", "post_attention_layernorm.weight"),
    ("moe.router.weight", "same", "mlp.router.weight"),
    ("moe.router.bias", "same", "mlp.router.bias"),
    ("moe.experts.gate_up_bias", "same", "mlp.experts.gate_up_proj_bias"),
    ("moe.experts.down_bias", "same", "mlp.experts.down_proj_bias"),
)
_HF_PACKED = (
    ("moe.experts.gate_up", "packed", "mlp.experts.gate_up_proj_blocks", "mlp.experts.gate_up_proj_scales"),
    ("moe.experts.down", "packed", "mlp.experts.down_proj_blocks", "mlp.experts.down_proj_scales"),
)
_HF_DENSE = (
    ("moe.experts.gate_up", "transposed", "mlp.experts.gate_up_proj"),
    ("moe.experts.down", "transposed", "mlp.experts.down_proj"),
)

_OPENAI_TOP = (
    ("embed.weight", "same", "embedding.weight"),
    ("norm.weight", "same", "norm.scale"),
    ("head.weight", "same", "unembedding.weight"),
)
_OPENAI_LAYER = (
    ("attn_norm.weight", "same", "attn.norm.scale"),
    ("attn.qkv.weight", "same", "attn.qkv.weight"),
    ("attn.qkv.bias", "same", "attn.qkv.bias"),
    ("attn.sinks", "same", "attn.sinks"),
    ("attn.out.weight", "same", "attn.out.weight"),
    ("attn.out.bias", "same", "attn.out.bias"),
    ("moe_norm.weight", "same", "mlp.norm.scale"),
    ("moe.router.weight", "same", "mlp.gate.weight"),
    ("moe.router.bias", "same", "mlp.gate.bias"),
    ("moe.experts.gate_up", "packed", "mlp.mlp1_weight.blocks", "mlp.mlp1_weight.scales"),
    ("moe.experts.gate_up_bias", "same", "mlp.mlp1_bias"),
    ("moe.experts.down", "packed", "mlp.mlp2_weight.blocks", "mlp.mlp2_weight.scales"),
    ("moe.experts.down_bias", "same", "mlp.mlp2_bias"),
)


def _rules(rows: Iterable[tuple[str, ...]], native: str = "", foreign: str = "") -> tuple[Rule, ...]:
    """Rules of table rows, with prefixes to the names of both sides."""
    return tuple(Rule(native + name, tuple(foreign + f for f in names), kind) for name, kind, *names in rows)


def _same(names: Iterable[str]) -> tuple[tuple[str, str, str], ...]:
    return tuple((name, "same", name) for name in names)


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "native",
            _rules(_same(row[0] for row in _HF_TOP)),
            _rules(_same(_NATIVE_LAYER), "blocks.{i}.", "blocks.{i}."),
            experts=None,
        ),
        Layout(
            "hf-mxfp4",
            _rules(_HF_TOP),
            _rules(_HF_LAYER + _HF_PACKED, "blocks.{i}.", "model.layers.{i}."),
            experts="mxfp4",
        ),
        Layout(
            "hf-bf16",
            _rules(_HF_TOP),
            _rules(_HF_LAYER + _HF_DENSE, "blocks.{i}.", "model.layers.{i}."),
            experts="dense",
        ),
        Layout(
            "openai",
            _rules(_OPENAI_TOP),
            _rules(_OPENAI_LAYER, "blocks.{i}.", "block.{i}."),
            experts="mxfp4",
            shard_name="model--{number:05d}-of-{count:05d}.safetensors",
        ),
    )
}


def native_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Logical shape of every native tensor of a model, in the order of :meth:`Layout.rules`."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    H, G, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (V, D)}
    for i in range(config.num_hidden_layers):
        E, qkv = config.experts_in_layer(i), (H + 2 * G) * Dh
        sizes = (
            (D,), (qkv, D), (qkv,), (H,), (D, H * Dh), (D,), (D,),
            (E, D), (E,), (E, 2 * F, D), (E, 2 * F), (E, D, F), (E, D),
        )  # fmt: skip
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in zip(_NATIVE_LAYER, sizes)}
    shapes["norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["head.weight"] = (V, D)
    return shapes


def is_expert_weight(native: str) -> bool:
    """Whether this native tensor may be packed."""
    return native.rpartition(".")[2] in EXPERT_WEIGHTS


def packed_shapes(format: str, shape: tuple[int, int, int], group: int = GROUP) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that hold a weight of the logical `shape` in groups of `group` inputs, zero points among them."""
    E, out, width = shape
    if format == "mxfp4":
        return {"blocks": (E, out, width // GROUP, GROUP // 2), "scales": (E, out, width // GROUP)}
    values = width if format == "int8" else width // 2
    groups = (E, out, width // group)
    return {"values": (E, out, values), "scales": groups, "zeros": groups}


def stored_shapes(rule: Rule, config: ModelConfig, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the foreign tensors of `rule`, whose native tensor has `shape`."""
    if rule.kind == "rows":
        H, G, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        return {name: (heads * Dh, *shape[1:]) for name, heads in zip(rule.foreign, (H, G, G))}
    if rule.kind == "packed":
        return dict(zip(rule.foreign, packed_shapes("mxfp4", shape).values()))
    if rule.kind == "transposed":
        return {rule.foreign[0]: (shape[0], shape[2], shape[1])}
    return {rule.foreign[0]: shape}


def to_native(rule: Rule, stored: list[Tensor]) -> Tensor | PackedWeight:
    """The native value of a rule's foreign tensors; views of them wherever that is possible."""
    if rule.kind == "rows":
        return torch.cat(stored)
    if rule.kind == "packed":
        return PackedWeight("mxfp4", dict(zip(FORMATS["mxfp4"].tensors, stored)))
    if rule.kind == "transposed":
        return stored[0].transpose(1, 2)
    return stored[0]


def from_native(rule: Rule, config: ModelConfig, value: Tensor | PackedWeight) -> dict[str, Tensor]:
    """The foreign tensors of a rule's native value, which has the layout's expert format already."""
    if rule.kind == "rows":
        H, G, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        return dict(zip(rule.foreign, value.split([H * Dh, G * Dh, G * Dh])))
    if rule.kind == "packed":
        return dict(zip(rule.foreign, value.tensors.values()))
    if rule.kind == "transposed":
        return {rule.foreign[0]: value.transpose(1, 2)}
    if isinstance(value, PackedWeight):
        return {f"{rule.foreign[0]}.{name}": tensor for name, tensor in value.tensors.items()}
    return {rule.foreign[0]: value}


def detect(names: Iterable[str], folder: object = "the folder") -> Layout:
    """The layout whose names these are; a CheckpointError where they are of another architecture."""
    names = set(names)
    if "embedding.weight" in names and any(n.startswith("block.") for n in names):
        return LAYOUTS["openai"]
    if "embed.weight" in names and any(n.startswith("blocks.") for n in names):
        return LAYOUTS["native"]
    # transformers once wrote dequantized experts under the names of packed ones, so one such name decides for packed
    if any(n.startswith("model.layers.") and ".mlp.experts." in n for n in names):
        return LAYOUTS["hf-mxfp4" if any(n.endswith("_proj_blocks") for n in names) else "hf-bf16"]
    some = ", ".join(sorted(names)[:3]) or "none"
    raise CheckpointError(
        f"{folder} holds weights of another architecture (tensors such as {some}); expected one of the layouts "
        f"{', '.join(LAYOUTS)} of a GPT-OSS-like model"
    )


def mismatch(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str | None:
    """What is missing, left over and mis-shaped, together, each with its nearest known name; None if all is well."""
    missing = [n for n in expected if n not in found]
    extra = [n for n in found if n not in expected]
    shaped = [n for n in expected if n in found and tuple(expected[n]) != tuple(found[n])]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing: {_listed(missing, extra)}")
    if extra:
        parts.append(f"{len(extra)} left over: {_listed(extra, missing or list(expected))}")
    if shaped:
        texts = [f"{n} {list(found[n])} instead of {list(expected[n])}" for n in shaped]
        parts.append(f"{len(shaped)} of another shape: {few(texts, _FEW)}")
    return "; ".join(parts) or None


def _listed(names: list[str], known: list[str]) -> str:
    texts = []
    for name in names[:_FEW]:
        near = difflib.get_close_matches(name, known[:2000], n=1, cutoff=0.7)
        texts.append(f"{name} (near {near[0]})" if near else name)
    return few(texts + names[_FEW:], _FEW)
