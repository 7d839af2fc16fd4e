"""config.json in all its spellings -> ModelConfig.

Three dialects, told apart by what they contain:
    native        model_type "xmoe": the fields of ModelConfig under their own names
    Hugging Face  model_type "gpt_oss": `rope_scaling` with `rope_theta` beside it (published), or `rope_parameters` with
                  the theta inside (transformers 5); `num_local_experts` or `num_experts`; `num_experts_per_tok` or
                  `experts_per_token`
    OpenAI        no model_type: the `original/config.json` of the published models

Keys we do not know are handed on, so that an export can write them again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xmoe.checkpoint.config_keys import CONFIG, GENERATION, HF_TYPE, NATIVE_TYPE, Keys
from xmoe.checkpoint.json_file import read_json
from xmoe.checkpoint.layer_experts import stated_experts
from xmoe.checkpoint.layouts import Layout
from xmoe.errors import CheckpointError, XmoeError
from xmoe.model.config import EFFORTS, FULL, MOST_SIZE, SLIDING, ModelConfig

# Keys that say nothing about the model's shape and that every export writes anew.
_REWRITTEN = (
    "architectures", "attention_dropout", "dtype", "model_type", "output_router_logits", "quantization_config",
    "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of `folder`, after making sure that it describes a model we can open."""
    file = folder / CONFIG
    content = read_json(file)
    kind = content.get("model_type")
    if kind not in (NATIVE_TYPE, HF_TYPE) and not (kind is None and "rope_ntk_beta" in content):
        what = f"model_type {repr(kind)[:60]}" if kind is not None else "no model_type"
        raise CheckpointError(
            f"{file} has {what}, a folder of another architecture; expected {HF_TYPE!r}, {NATIVE_TYPE!r} or the "
            "config.json of OpenAI's original/ folder"
        )
    return content


def number_of_layers(content: Mapping[str, Any], file: Path) -> int:
    """num_hidden_layers, needed before the weights can be looked at."""
    return Keys(content, file).integer("num_hidden_layers")


def check_quantization(content: Mapping[str, Any], layout: Layout, file: Path) -> None:
    """quantization_config must say what the tensors are, because other loaders believe it blindly."""
    if content.get("model_type") != HF_TYPE or layout.name not in ("hf-mxfp4", "hf-bf16"):
        return
    stated = content.get("quantization_config")
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    if layout.experts == "mxfp4" and method != "mxfp4":
        raise CheckpointError(
            f"{file}: quantization_config says {repr(method)[:60]}, but the experts are stored as MXFP4 blocks and scales; "
            'expected quant_method "mxfp4" (transformers would fill in random experts)'
        )
    if layout.experts == "dense" and method is not None:
        raise CheckpointError(
            f"{file}: quantization_config says {repr(method)[:60]}, but the experts are stored dense; remove that key"
        )


def to_model_config(
    content: Mapping[str, Any], experts: Sequence[int], file: Path
) -> tuple[ModelConfig, dict[str, Any]]:
    """ModelConfig and the keys that were not needed for it.

    Args:
        content: what :func:`read_config` returned.
        experts: experts of each layer, counted in the weights. What the file says must agree.
    """
    keys = Keys(content, file)
    stated = stated_experts(keys, len(experts))
    if stated is not None and tuple(stated) != tuple(experts):
        layer = next((i for i, (a, b) in enumerate(zip(stated, experts)) if a != b), 0)
        raise CheckpointError(
            f"{file} says {str(stated[layer])[:24]} experts in layer {layer} (num_experts or num_local_experts), but the "
            f"router's weights there have {experts[layer]} rows; config and weights are of different models"
        )
    try:
        fields = _FIELDS[content.get("model_type")](keys)
        config = ModelConfig(num_experts=tuple(experts), **fields)
    except XmoeError as e:
        raise e if isinstance(e, CheckpointError) else CheckpointError(f"{file}: {e}") from e
    used = keys.used.union(_REWRITTEN)
    return config, {key: value for key, value in content.items() if key not in used and value is not None}


def _shared_fields(keys: Keys) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    fields: dict[str, Any] = {name: keys.integer(name) for name in names}
    fields["num_key_value_heads"] = keys.integer("num_key_value_heads", default=fields["num_attention_heads"])
    fields["head_dim"] = keys.integer(
        "head_dim", default=fields["hidden_size"] // max(fields["num_attention_heads"], 1)
    )
    fields["num_experts_per_tok"] = keys.integer("num_experts_per_tok", "experts_per_token")
    fields["sliding_window"] = keys.integer("sliding_window", default=128)
    fields["swiglu_limit"] = keys.number("swiglu_limit", default=7.0)
    return fields


def _hugging_face_fields(keys: Keys) -> dict[str, Any]:
    for name, value in (("hidden_act", "silu"), ("attention_bias", True), ("swiglu_alpha", 1.702)):
        keys.fixed(name, value)
    fields = _shared_fields(keys)
    fields["max_position_embeddings"] = keys.integer("max_position_embeddings", default=131072)
    fields |= _rope_fields(keys, fields["max_position_embeddings"])
    fields["rms_norm_eps"] = keys.number("rms_norm_eps", default=1e-5)
    fields["initializer_range"] = keys.number("initializer_range", default=0.02)
    fields["tie_word_embeddings"] = keys.find("tie_word_embeddings", default=False) is True
    fields["layer_types"] = _layer_types(keys)
    fields["reasoning_effort"] = _effort(keys)
    return fields


def _rope_fields(keys: Keys, longest: int) -> dict[str, Any]:
    """RoPE from `rope_scaling` (with rope_theta beside it) or `rope_parameters` (with rope_theta inside)."""
    scaling, parameters = keys.find("rope_scaling"), keys.find("rope_parameters")
    rope, theta = parameters or scaling, keys.find("rope_theta")
    context = keys.integer("initial_context_length", default=0)
    if rope is None:  # transformers falls back to these for gpt_oss
        rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{keys.file}: rope_scaling is {str(rope)[:60]!r}; expected an object")
    if set(rope) <= {SLIDING, FULL} and rope:  # transformers may write one object a layer type
        kinds = list(rope.values())
        if any(k != kinds[0] for k in kinds) or not isinstance(kinds[0], dict):
            raise CheckpointError(f"{keys.file}: rope_parameters differ by layer type, which is not supported")
        rope = kinds[0]
    inner = Keys(rope, keys.file)
    fields = {"rope_theta": inner.number("rope_theta", default=150000.0 if theta is None else theta)}
    kind = inner.find("rope_type", "type", default="default")
    if kind == "default":
        return fields | {
            "initial_context_length": context or longest,
            "rope_scaling_factor": 1.0,
        }
    if kind != "yarn":
        raise CheckpointError(f"{keys.file}: rope_type is {repr(kind)[:60]}; expected 'yarn' or 'default'")
    factor = inner.number("factor")
    concentration = 0.1 * math.log(max(factor, 1.0)) + 1.0
    if factor > 1 and inner.find("truncate", default=True) is not False:
        raise CheckpointError(f'{keys.file}: YaRN with rounded bounds is not supported; expected "truncate": false')
    if inner.find("mscale", "mscale_all_dim") is not None or not math.isclose(
        inner.number("attention_factor", default=concentration), concentration, rel_tol=1e-6
    ):
        raise CheckpointError(
            f"{keys.file}: rope_scaling sets attention_factor or mscale; only YaRN's own is supported"
        )
    return fields | {
        "initial_context_length": inner.integer("original_max_position_embeddings", default=context or 4096),
        "rope_scaling_factor": factor,
        "rope_beta_fast": inner.number("beta_fast", default=32.0),
        "rope_beta_slow": inner.number("beta_slow", default=1.0),
    }


def _openai_fields(keys: Keys) -> dict[str, Any]:
    fields = _shared_fields(keys)
    fields["initial_context_length"] = keys.integer("initial_context_length", default=4096)
    fields["rope_theta"] = keys.number("rope_theta")
    fields["rope_scaling_factor"] = keys.number("rope_scaling_factor")
    fields["rope_beta_slow"] = keys.number("rope_ntk_alpha")
    fields["rope_beta_fast"] = keys.number("rope_ntk_beta")
    beyond = MOST_SIZE + 1  # which ModelConfig refuses
    longest = min(fields["initial_context_length"], beyond) * max(fields["rope_scaling_factor"], 1)
    fields["max_position_embeddings"] = round(min(longest, beyond))
    return fields


def _native_fields(keys: Keys) -> dict[str, Any]:
    known = {f.name: f for f in dataclasses.fields(ModelConfig)}
    fields = {n: v for n, v in keys.content.items() if n in known and n != "num_experts"}
    keys.used.update(known)
    for name, value in fields.items():
        wanted = str(known[name].type)
        fits = {"int": type(value) is int, "float": type(value) in (int, float), "bool": type(value) is bool}
        if not fits.get(wanted, True):
            raise CheckpointError(f"{keys.file}: {name} is {str(value)[:60]!r}; expected {wanted}")
    required = [n for n, f in known.items() if f.default is dataclasses.MISSING and n != "num_experts"]
    if lacking := [n for n in required if n not in fields]:
        raise CheckpointError(f"{keys.file} lacks {', '.join(lacking)}")
    fields["layer_types"] = _layer_types(keys)
    fields["reasoning_effort"] = _effort(keys)
    return fields


_FIELDS = {HF_TYPE: _hugging_face_fields, NATIVE_TYPE: _native_fields, None: _openai_fields}


def _layer_types(keys: Keys) -> tuple[str, ...] | None:
    types = keys.find("layer_types")
    if types is not None and not (isinstance(types, list) and all(isinstance(t, str) for t in types)):
        raise CheckpointError(f"{keys.file}: layer_types is {str(types)[:60]!r}; expected a list of names")
    return None if types is None else tuple(types)


def _effort(keys: Keys) -> dict[str, int] | None:
    table = keys.find("reasoning_effort")
    fits = isinstance(table, dict) and set(table) <= set(EFFORTS) and all(type(k) is int for k in table.values())
    if table is not None and not fits:
        raise CheckpointError(
            f"{keys.file}: reasoning_effort is {str(table)[:60]!r}; expected effort -> experts a token"
        )
    return table


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
