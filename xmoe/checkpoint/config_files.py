"""config.json in all its spellings <-> ModelConfig.

Three dialects, told apart by what they contain:
    native        model_type "xmoe": the fields of ModelConfig under their own names
    Hugging Face  model_type "gpt_oss": `rope_scaling` with `rope_theta` beside it (published), or `rope_parameters` with
                  the theta inside (transformers 5); `num_local_experts` or `num_experts`; `num_experts_per_tok` or
                  `experts_per_token`
    OpenAI        no model_type: the `original/config.json` of the published models

What is written is what every reader understands: the published keys, old spellings included, in the published order, so
that the presets reproduce both published files byte for byte. Keys we do not know travel along unchanged.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xmoe.checkpoint.layouts import Layout
from xmoe.checkpoint.shards import read_json
from xmoe.errors import CheckpointError, ConfigError, XmoeError
from xmoe.model.config import EFFORTS, FULL, SLIDING, ModelConfig

CONFIG = "config.json"
GENERATION = "generation_config.json"

NATIVE_TYPE, HF_TYPE = "xmoe", "gpt_oss"

HARMONY_VOCABULARY = 201088
"""Rows of the embedding of the published models; their special tokens are known, so exports can name them."""

_HARMONY_TOKENS = {"eos_token_id": 200002, "pad_token_id": 199999}
_HARMONY_GENERATION = {
    "bos_token_id": 199998,
    "do_sample": True,
    "eos_token_id": [200002, 199999, 200012],  # <|return|>, <|endoftext|>, <|call|>
    "pad_token_id": 199999,
}
_WRITTEN_FOR = "4.55.0.dev0"  # the transformers version whose keys these are; the published files say the same

_QUANTIZATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}

# Keys that say nothing about the model's shape and that every export writes anew.
_REWRITTEN = (
    "architectures", "attention_dropout", "dtype", "model_type", "output_router_logits", "quantization_config",
    "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- reading


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of `folder`, after making sure that it describes a model we can open."""
    file = folder / CONFIG
    content = read_json(file)
    kind = content.get("model_type")
    if kind not in (NATIVE_TYPE, HF_TYPE) and not (kind is None and "rope_ntk_beta" in content):
        what = f"model_type {kind!r}" if kind is not None else "no model_type"
        raise CheckpointError(
            f"{file} has {what}, a folder of another architecture; expected {HF_TYPE!r}, {NATIVE_TYPE!r} or the "
            "config.json of OpenAI's original/ folder"
        )
    return content


def number_of_layers(content: Mapping[str, Any], file: Path) -> int:
    """num_hidden_layers, needed before the weights can be looked at."""
    return _Reader(content, file).integer("num_hidden_layers")


def check_quantization(content: Mapping[str, Any], layout: Layout, file: Path) -> None:
    """quantization_config must say what the tensors are, because other loaders believe it blindly."""
    if content.get("model_type") != HF_TYPE or layout.name not in ("hf-mxfp4", "hf-bf16"):
        return
    stated = content.get("quantization_config")
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    if layout.experts == "mxfp4" and method != "mxfp4":
        raise CheckpointError(
            f"{file}: quantization_config says {method!r}, but the experts are stored as MXFP4 blocks and scales; "
            'expected quant_method "mxfp4" (transformers would fill in random experts)'
        )
    if layout.experts == "dense" and method is not None:
        raise CheckpointError(
            f"{file}: quantization_config says {method!r}, but the experts are stored dense; remove that key"
        )


def to_model_config(
    content: Mapping[str, Any], experts: Sequence[int], file: Path
) -> tuple[ModelConfig, dict[str, Any]]:
    """ModelConfig and the keys that were not needed for it.

    Args:
        content: what :func:`read_config` returned.
        experts: experts of each layer, counted in the weights. What the file says must agree.
    """
    reader = _Reader(content, file)
    stated = _stated_experts(reader, len(experts))
    if stated is not None and tuple(stated) != tuple(experts):
        layer = next((i for i, (a, b) in enumerate(zip(stated, experts)) if a != b), 0)
        raise CheckpointError(
            f"{file} says {stated[layer]} experts in layer {layer} (num_experts or num_local_experts), but the router's "
            f"weights there have {experts[layer]} rows; config and weights are of different models"
        )
    try:
        fields = _FIELDS[content.get("model_type")](reader)
        config = ModelConfig(num_experts=tuple(experts), **fields)
    except XmoeError as e:
        raise e if isinstance(e, CheckpointError) else CheckpointError(f"{file}: {e}") from e
    used = reader.used.union(_REWRITTEN)
    return config, {key: value for key, value in content.items() if key not in used and value is not None}


class _Reader:
    """Looks keys up by any of their spellings, checks types, and remembers in `used` what was asked for.

    None counts as absent, as it does in transformers.
    """

    def __init__(self, content: Mapping[str, Any], file: Path):
        self.content, self.file = content, file
        self.used: set[str] = set()

    def find(self, *names: str, default: Any = None) -> Any:
        self.used.update(names)
        values = {n: self.content[n] for n in names if self.content.get(n) is not None}
        if len({json.dumps(v, sort_keys=True) for v in values.values()}) > 1:
            both = ", ".join(f"{n} {str(v)[:60]!r}" for n, v in values.items())
            raise CheckpointError(f"{self.file} contradicts itself: {both}")
        return next(iter(values.values()), default)

    def integer(self, *names: str, default: int | None = None) -> int:
        return self._typed(names, default, lambda v: type(v) is int, "a whole number")

    def number(self, *names: str, default: float | None = None) -> float:
        return float(self._typed(names, default, lambda v: type(v) in (int, float) and math.isfinite(v), "a number"))

    def _typed(self, names, default, accept, kind):
        value = self.find(*names, default=default)
        if value is None:
            raise CheckpointError(f"{self.file} lacks {' or '.join(names)}")
        if not accept(value):
            raise CheckpointError(f"{self.file}: {names[0]} is {str(value)[:60]!r}; expected {kind}")
        return value

    def fixed(self, name: str, value: Any) -> None:
        """A key that xmoe has no knob for must have the value that GPT-OSS has, or be absent."""
        found = self.find(name, default=value)
        if found != value:
            raise CheckpointError(f"{self.file}: {name} is {found!r}; only GPT-OSS's {value!r} is supported")


def _shared_fields(reader: _Reader) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    fields: dict[str, Any] = {name: reader.integer(name) for name in names}
    fields["num_key_value_heads"] = reader.integer("num_key_value_heads", default=fields["num_attention_heads"])
    fields["head_dim"] = reader.integer(
        "head_dim", default=fields["hidden_size"] // max(fields["num_attention_heads"], 1)
    )
    fields["num_experts_per_tok"] = reader.integer("num_experts_per_tok", "experts_per_token")
    fields["sliding_window"] = reader.integer("sliding_window", default=128)
    fields["swiglu_limit"] = reader.number("swiglu_limit", default=7.0)
    return fields


def _hugging_face_fields(reader: _Reader) -> dict[str, Any]:
    for name, value in (("hidden_act", "silu"), ("attention_bias", True), ("swiglu_alpha", 1.702)):
        reader.fixed(name, value)
    fields = _shared_fields(reader)
    fields["max_position_embeddings"] = reader.integer("max_position_embeddings", default=131072)
    fields |= _rope_fields(reader, fields["max_position_embeddings"])
    fields["rms_norm_eps"] = reader.number("rms_norm_eps", default=1e-5)
    fields["initializer_range"] = reader.number("initializer_range", default=0.02)
    fields["tie_word_embeddings"] = reader.find("tie_word_embeddings", default=False) is True
    fields["layer_types"] = _layer_types(reader)
    fields["reasoning_effort"] = _effort(reader)
    return fields


def _rope_fields(reader: _Reader, longest: int) -> dict[str, Any]:
    """RoPE from `rope_scaling` (with rope_theta beside it) or `rope_parameters` (with rope_theta inside)."""
    scaling, parameters = reader.find("rope_scaling"), reader.find("rope_parameters")
    rope, theta = parameters or scaling, reader.find("rope_theta")
    context = reader.integer("initial_context_length", default=0)
    if rope is None:  # transformers falls back to these for gpt_oss
        rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{reader.file}: rope_scaling is {str(rope)[:60]!r}; expected an object")
    if set(rope) <= {SLIDING, FULL} and rope:  # transformers may write one object a layer type
        kinds = list(rope.values())
        if any(k != kinds[0] for k in kinds) or not isinstance(kinds[0], dict):
            raise CheckpointError(f"{reader.file}: rope_parameters differ by layer type, which is not supported")
        rope = kinds[0]
    inner = _Reader(rope, reader.file)
    fields = {"rope_theta": inner.number("rope_theta", default=150000.0 if theta is None else theta)}
    kind = inner.find("rope_type", "type", default="default")
    if kind == "default":
        return fields | {
            "initial_context_length": context or longest,
            "rope_scaling_factor": 1.0,
        }
    if kind != "yarn":
        raise CheckpointError(f"{reader.file}: rope_type is {kind!r}; expected 'yarn' or 'default'")
    factor = inner.number("factor")
    concentration = 0.1 * math.log(max(factor, 1.0)) + 1.0
    if factor > 1 and inner.find("truncate", default=True) is not False:
        raise CheckpointError(f'{reader.file}: YaRN with rounded bounds is not supported; expected "truncate": false')
    if inner.find("mscale", "mscale_all_dim") is not None or not math.isclose(
        inner.number("attention_factor", default=concentration), concentration, rel_tol=1e-6
    ):
        raise CheckpointError(
            f"{reader.file}: rope_scaling sets attention_factor or mscale; only YaRN's own is supported"
        )
    return fields | {
        "initial_context_length": inner.integer("original_max_position_embeddings", default=context or 4096),
        "rope_scaling_factor": factor,
        "rope_beta_fast": inner.number("beta_fast", default=32.0),
        "rope_beta_slow": inner.number("beta_slow", default=1.0),
    }


def _openai_fields(reader: _Reader) -> dict[str, Any]:
    fields = _shared_fields(reader)
    fields["initial_context_length"] = reader.integer("initial_context_length", default=4096)
    fields["rope_theta"] = reader.number("rope_theta")
    fields["rope_scaling_factor"] = reader.number("rope_scaling_factor")
    fields["rope_beta_slow"] = reader.number("rope_ntk_alpha")
    fields["rope_beta_fast"] = reader.number("rope_ntk_beta")
    fields["max_position_embeddings"] = round(fields["initial_context_length"] * max(fields["rope_scaling_factor"], 1))
    return fields


def _native_fields(reader: _Reader) -> dict[str, Any]:
    known = {f.name: f for f in dataclasses.fields(ModelConfig)}
    fields = {n: v for n, v in reader.content.items() if n in known and n != "num_experts"}
    reader.used.update(known)
    for name, value in fields.items():
        wanted = str(known[name].type)
        fits = {"int": type(value) is int, "float": type(value) in (int, float), "bool": type(value) is bool}
        if not fits.get(wanted, True):
            raise CheckpointError(f"{reader.file}: {name} is {str(value)[:60]!r}; expected {wanted}")
    required = [n for n, f in known.items() if f.default is dataclasses.MISSING and n != "num_experts"]
    if lacking := [n for n in required if n not in fields]:
        raise CheckpointError(f"{reader.file} lacks {', '.join(lacking)}")
    fields["layer_types"] = _layer_types(reader)
    fields["reasoning_effort"] = _effort(reader)
    return fields


_FIELDS = {HF_TYPE: _hugging_face_fields, NATIVE_TYPE: _native_fields, None: _openai_fields}


def _layer_types(reader: _Reader) -> tuple[str, ...] | None:
    types = reader.find("layer_types")
    if types is not None and not (isinstance(types, list) and all(isinstance(t, str) for t in types)):
        raise CheckpointError(f"{reader.file}: layer_types is {str(types)[:60]!r}; expected a list of names")
    return None if types is None else tuple(types)


def _effort(reader: _Reader) -> dict[str, int] | None:
    table = reader.find("reasoning_effort")
    fits = isinstance(table, dict) and set(table) <= set(EFFORTS) and all(type(k) is int for k in table.values())
    if table is not None and not fits:
        raise CheckpointError(
            f"{reader.file}: reasoning_effort is {str(table)[:60]!r}; expected effort -> experts a token"
        )
    return table


def _stated_experts(reader: _Reader, layers: int) -> list[int] | None:
    """Experts of each layer as the file says, in any of the ways seen; None where it says nothing."""
    own = _layers_of_their_own(reader, layers)
    count = reader.find("num_local_experts", "num_experts", default=None if len(own) < layers else [0] * layers)
    if isinstance(count, int) and not isinstance(count, bool):
        count = [count] * layers
    if count is not None and not (isinstance(count, list) and all(type(n) is int for n in count)):
        raise CheckpointError(f"{reader.file}: num_experts is {str(count)[:60]!r}; expected a whole number")
    if count is not None and len(count) != layers:
        raise CheckpointError(f"{reader.file}: num_experts lists {len(count)} layers; expected {layers}")
    return None if count is None else [own.get(layer, number) for layer, number in enumerate(count)]


def _layers_of_their_own(reader: _Reader, layers: int) -> dict[int, int]:
    """Layer -> experts, where a layer has an entry of its own that says so: the two ways pruned models are written.

    transformers 5 has `per_layer_config` {"3": {"num_local_experts": 16}} for the layers that differ; NVIDIA's Puzzle
    has a list `block_configs` with `ffn.moe.num_local_experts` for every layer. In both, a layer's entry goes before the
    number for all. An entry that changes anything but the number of experts is refused: the model has no words for it.
    """
    per_layer, blocks = reader.find("per_layer_config", default={}), reader.find("block_configs", default=[])
    experts: dict[int, int] = {}
    if not isinstance(per_layer, dict) or not isinstance(blocks, list) or len(blocks) not in (0, layers):
        raise CheckpointError(
            f"{reader.file}: expected per_layer_config as an object by layer, and block_configs as a list of {layers}"
        )

    def entry(name: str, layer: int, content: Any, same: dict[str, Any]) -> None:
        """Take the experts of one layer; everything else it says must be what `same` or the whole model says."""
        if not 0 <= layer < layers or not isinstance(content, dict):
            raise CheckpointError(f"{reader.file}: {name} has no sense for layer {layer} of {layers}")
        for key, value in content.items():
            if key in ("num_local_experts", "num_experts"):
                if type(value) is not int or experts.setdefault(layer, value) != value:
                    raise CheckpointError(f"{reader.file}: {name} says {str(value)[:60]!r} experts in layer {layer}")
            elif value is not None and value != same.get(key, reader.content.get(key)):
                raise CheckpointError(
                    f"{reader.file}: {name} gives layer {layer} {key} {str(value)[:60]!r}; only the number of experts may "
                    "differ by layer"
                )

    for key, content in per_layer.items():
        entry("per_layer_config", int(key) if key.isdecimal() else -1, content, {})
    whole = {"no_op": False, "replace_with_linear": False, "weights_precision": "bf16"}
    for layer, block in enumerate(blocks):
        parts = [block.get(name) for name in ("attention", "ffn")] if isinstance(block, dict) else []
        moe = parts[1].get("moe") if len(parts) == 2 and isinstance(parts[1], dict) else None
        if not isinstance(moe, dict):
            raise CheckpointError(
                f"{reader.file}: block_configs has no ffn.moe in layer {layer}; expected a GPT-OSS block"
            )
        size = {"expert_intermediate_dim": reader.content.get("intermediate_size")}
        entry("block_configs", layer, parts[0], whole)
        entry("block_configs", layer, {k: v for k, v in parts[1].items() if k != "moe"}, whole)
        # GPT-OSS has no shared expert; the width that Puzzle notes for one means nothing.
        entry("block_configs", layer, {k: v for k, v in moe.items() if k != "shared_expert_intermediate_dim"}, size)
    return experts


def end_tokens(folder: Path, extra: Mapping[str, Any]) -> frozenset[int]:
    """The ids at which generation ends by the word of a checkpoint: generation_config.json's, else config.json's.

    Args:
        folder: of the checkpoint.
        extra: the keys of its config.json that :func:`to_model_config` left over. Empty where neither file says any.
    """
    file = folder / GENERATION
    stated = read_json(file).get("eos_token_id") if file.is_file() else None
    stated = extra.get("eos_token_id") if stated is None else stated
    ids = stated if isinstance(stated, list) else [stated]
    return frozenset(id for id in ids if type(id) is int)


# ---------------------------------------------------------------------------------------------------------- writing


def config_text(config: ModelConfig, layout: Layout, extra: Mapping[str, Any] | None = None) -> str:
    """The config.json of a checkpoint in `layout`; `extra` keys are added (or say what eos_token_id is).

    Raises:
        ConfigError: the layout cannot express the model. Nothing is bent silently.
    """
    content = {"native": _native_content, "openai": _openai_content}.get(layout.name, _hugging_face_content)(
        config, layout, dict(extra or {})
    )
    return json.dumps(content, indent=2) + "\n"


def generation_text(config: ModelConfig, extra: Mapping[str, Any] | None = None) -> str | None:
    """The generation_config.json to write where the source brings none; None where no stop token is known."""
    if config.vocab_size == HARMONY_VOCABULARY:
        content = _HARMONY_GENERATION
    else:
        content = {k: extra[k] for k in ("eos_token_id", "pad_token_id") if (extra or {}).get(k) is not None}
    return json.dumps({**content, "transformers_version": _WRITTEN_FOR}, indent=2) + "\n" if content else None


def check_expressible(config: ModelConfig, layout: Layout) -> None:
    """Raise :class:`ConfigError` where `layout` has no words for this model."""
    if layout.name == "native":
        return
    if isinstance(config.num_experts, tuple):
        fewest, most = min(config.num_experts), max(config.num_experts)
        raise ConfigError(
            f"the layers have {fewest} to {most} experts and {layout.name} has one number for all; "
            "choose --layout native, or prune every layer to the same count"
        )
    if layout.experts == "mxfp4" and (config.hidden_size % 32 or config.intermediate_size % 32):
        raise ConfigError(
            f"{layout.name} packs experts 32 inputs at a time, and hidden_size {config.hidden_size} or intermediate_size "
            f"{config.intermediate_size} is no multiple of 32; choose hf-bf16 or native"
        )
    if layout.name != "openai":
        return
    alternating = tuple(FULL if i % 2 else SLIDING for i in range(config.num_hidden_layers))
    if config.layer_types != alternating or not math.isclose(config.rms_norm_eps, 1e-5):
        raise ConfigError(
            "the openai layout fixes rms_norm_eps 1e-5 and sliding layers at even places, and this model has "
            "other values; choose hf-mxfp4 or native"
        )
    if round(config.initial_context_length * max(config.rope_scaling_factor, 1)) != config.max_position_embeddings:
        raise ConfigError(
            f"the openai layout has a context of initial_context_length * rope_scaling_factor, and "
            f"max_position_embeddings is {config.max_position_embeddings}; choose hf-mxfp4 or native"
        )


def _native_content(config: ModelConfig, layout: Layout, extra: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": NATIVE_TYPE, **dataclasses.asdict(config), **extra}


def _hugging_face_content(config: ModelConfig, layout: Layout, extra: dict[str, Any]) -> dict[str, Any]:
    harmony = _HARMONY_TOKENS if config.vocab_size == HARMONY_VOCABULARY else {}
    content: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "experts_per_token": config.num_experts_per_tok,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initial_context_length": config.initial_context_length,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "layer_types": list(config.layer_types),
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": HF_TYPE,
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_local_experts": config.num_experts,
        "output_router_logits": False,
        "rms_norm_eps": config.rms_norm_eps,
        # Written for plain RoPE too, with factor 1, which means the same: without it readers assume factor 32.
        "rope_scaling": {
            "beta_fast": float(config.rope_beta_fast),
            "beta_slow": float(config.rope_beta_slow),
            "factor": float(config.rope_scaling_factor),
            "original_max_position_embeddings": config.initial_context_length,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": _whole(config.rope_theta),
        "router_aux_loss_coef": 0.9,
        "sliding_window": config.sliding_window,
        "swiglu_limit": float(config.swiglu_limit),
        "tie_word_embeddings": False,  # exports carry an lm_head of their own, which every reader finds
        "transformers_version": _WRITTEN_FOR,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        **harmony,
        **extra,
    }
    if layout.experts == "mxfp4":
        content["quantization_config"] = _QUANTIZATION
    if config.reasoning_effort is not None:
        content["reasoning_effort"] = config.reasoning_effort
    return dict(sorted(content.items()))


def _openai_content(config: ModelConfig, layout: Layout, extra: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "num_experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "swiglu_limit": float(config.swiglu_limit),
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "sliding_window": config.sliding_window,
        "initial_context_length": config.initial_context_length,
        "rope_theta": _whole(config.rope_theta),
        "rope_scaling_factor": float(config.rope_scaling_factor),
        "rope_ntk_alpha": _whole(config.rope_beta_slow),
        "rope_ntk_beta": _whole(config.rope_beta_fast),
        **extra,
    }


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
