"""ModelConfig -> config.json, in the words of each layout.

What is written is what every reader understands: the published keys, old spellings included, in the published order, so
that the presets reproduce both published files byte for byte. Keys we do not know travel along unchanged.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from xmoe.checkpoint.config_keys import HF_TYPE, NATIVE_TYPE
from xmoe.checkpoint.layouts import Layout
from xmoe.errors import ConfigError
from xmoe.model.config import FULL, SLIDING, ModelConfig

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
