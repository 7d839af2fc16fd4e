"""The shape of a model: ModelConfig, the presets, and how many parameters each has.

Field names are those of GPT-OSS's `config.json`, so that nothing needs translating.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from xmoe.errors import ConfigError

SLIDING, FULL = "sliding_attention", "full_attention"
EFFORTS = ("low", "medium", "high")
MOST_LAYERS, MOST_SIZE = 10_000, 2**31 - 1  # beyond any model; a larger number comes from a damaged file


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the network's shape and numerics.

    `num_experts` is one number, or one a layer (after an uneven prune). `layer_types` is one of "sliding_attention" and
    "full_attention" a layer; None alternates them, layer 0 sliding, as GPT-OSS does. `initial_context_length` is the
    context before YaRN stretches it by `rope_scaling_factor` (1: plain RoPE). `reasoning_effort` says how many experts a
    token visits at low, medium and high effort; None where effort is but a word in the prompt (GPT-OSS).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int | tuple[int, ...]
    num_experts_per_tok: int
    layer_types: tuple[str, ...] | None = None
    sliding_window: int = 128
    max_position_embeddings: int = 2048
    initial_context_length: int = 2048
    rope_theta: float = 10000.0
    rope_scaling_factor: float = 1.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    reasoning_effort: dict[str, int] | None = None

    PRESETS: ClassVar[dict[str, dict]] = {}  # filled below
    ALIASES: ClassVar[dict[str, str]] = {
        "dim": "hidden_size",
        "d_model": "hidden_size",
        "n_embd": "hidden_size",
        "embed_dim": "hidden_size",
        "moe_intermediate_size": "intermediate_size",
        "d_ff": "intermediate_size",
        "ffn_dim": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "n_layer": "num_hidden_layers",
        "n_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "n_head": "num_attention_heads",
        "n_heads": "num_attention_heads",
        "n_local_heads": "num_key_value_heads",
        "n_kv_heads": "num_key_value_heads",
        "num_kv_heads": "num_key_value_heads",
        "n_experts": "num_experts",
        "num_local_experts": "num_experts",
        "n_routed_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "top_k": "num_experts_per_tok",
        "moe_k": "num_experts_per_tok",
        "num_experts_per_token": "num_experts_per_tok",
        "context_length": "max_position_embeddings",
        "max_seq_len": "max_position_embeddings",
        "block_size": "max_position_embeddings",
        "window_pattern": "layer_types",
        "window": "sliding_window",
        "bandwidth": "sliding_window",
        "tie_embeddings": "tie_word_embeddings",
        "norm_eps": "rms_norm_eps",
        "vocab": "vocab_size",
    }

    def __post_init__(self):
        if self.num_hidden_layers > MOST_LAYERS:  # said here, before anything counts so far
            raise ConfigError(
                f"model.num_hidden_layers is {_in_short(self.num_hidden_layers)}; expected at most {MOST_LAYERS:,}"
            )
        if self.layer_types is None:
            types = tuple(FULL if i % 2 else SLIDING for i in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", types)
        if not isinstance(self.num_experts, int):
            object.__setattr__(self, "num_experts", _one_if_equal(tuple(self.num_experts)))
        self._check()

    def _check(self) -> None:
        sizes = (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "num_experts_per_tok", "sliding_window", "max_position_embeddings",
            "initial_context_length",
        )  # fmt: skip
        for name in sizes:
            _check_range(name, getattr(self, name), 1, MOST_SIZE)
        if isinstance(self.num_experts, tuple) and len(self.num_experts) != self.num_hidden_layers:
            raise ConfigError(
                f"model.num_experts lists {len(self.num_experts)} layers; expected {self.num_hidden_layers}, or one number"
            )
        for layer in range(self.num_hidden_layers if isinstance(self.num_experts, tuple) else 1):
            _check_range("num_experts", self.experts_in_layer(layer), 1, MOST_SIZE)
        for name in ("rope_scaling_factor", "rope_beta_fast", "rope_beta_slow"):
            _check_range(name, getattr(self, name), 1e-30, 1e30)
        for name in ("rms_norm_eps", "initializer_range"):
            _check_range(name, getattr(self, name), 0, 1e30)
        _check_range("swiglu_limit", self.swiglu_limit, 1e-30, math.inf)
        _check_range("rope_theta", self.rope_theta, 1.001, 1e30)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model.num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; each key-value head serves equally many query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim is {self.head_dim}; expected an even number (rotary pairs)")
        if len(self.layer_types) != self.num_hidden_layers or set(self.layer_types) - {SLIDING, FULL}:
            raise ConfigError(
                f"model.layer_types has {len(self.layer_types)} entries {sorted(set(self.layer_types))}; expected "
                f"{self.num_hidden_layers}, each {SLIDING} or {FULL}"
            )
        fewest = min(self.experts_in_layer(i) for i in range(self.num_hidden_layers))
        if fewest < self.num_experts_per_tok:
            raise ConfigError(
                f"model.num_experts is {fewest}, fewer than num_experts_per_tok {self.num_experts_per_tok}; "
                f"a token cannot visit more experts than there are"
            )
        for effort, k in (self.reasoning_effort or {}).items():
            if effort not in EFFORTS or not 1 <= k <= fewest:
                raise ConfigError(
                    f"model.reasoning_effort {{{str(effort)[:24]}: {_in_short(k)}}}: "
                    f"expected {', '.join(EFFORTS)} with 1 to {fewest} experts each"
                )

    # ------------------------------------------------------------------------------------------------ derived sizes

    def experts_in_layer(self, layer: int) -> int:
        """How many experts layer `layer` has."""
        return self.num_experts if isinstance(self.num_experts, int) else self.num_experts[layer]

    def window(self, layer: int) -> int | None:
        """Keys a query of this layer sees, itself included; None in a full layer."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def parameter_count(self) -> int:
        """All parameters. Tied embeddings count once."""
        return self._count(lambda layer: self.experts_in_layer(layer))

    def active_parameter_count(self, input_embedding: bool = False) -> int:
        """Parameters that one token meets: K experts a layer instead of all.

        The convention behind "3.6B active" leaves the input embedding out (a lookup, not a product) and counts the
        unembedding; tied embeddings are therefore counted once either way.
        """
        active = self._count(lambda layer: min(self.num_experts_per_tok, self.experts_in_layer(layer)))
        untied = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return active if input_embedding else active - untied

    def expert_parameter_count(self) -> int:
        """Parameters of one expert: gate_up and down with their biases."""
        D, F = self.hidden_size, self.intermediate_size
        return 2 * F * D + 2 * F + D * F + D

    def _count(self, experts_of) -> int:
        D, H, G, Dh = self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim
        qkv = (H + 2 * G) * Dh
        attention = qkv * D + qkv + D * H * Dh + D + H
        total = self.vocab_size * D * (1 if self.tie_word_embeddings else 2) + D
        for layer in range(self.num_hidden_layers):
            router = self.experts_in_layer(layer) * (D + 1)
            total += attention + 2 * D + router + experts_of(layer) * self.expert_parameter_count()
        return total


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        high = f"{high:,}" if isinstance(high, int) else f"{high:g}"
        raise ConfigError(f"model.{name} is {_in_short(value)}; expected {low:g} to {high}")


def _in_short(number: float) -> str:
    """A number of any length on one line."""
    if isinstance(number, int) and abs(number) >= 10**24:
        return f"an integer of {number.bit_length()} bits"
    return str(number)


def _one_if_equal(counts: tuple[int, ...]) -> int | tuple[int, ...]:
    return counts[0] if len(set(counts)) == 1 else counts


_EFFORT = {"low": 1, "medium": 2, "high": 4}


def _small(hidden: int, layers: int, heads: int, kv_heads: int, experts: int) -> dict:
    """The four variants one can train: intermediate width equals hidden width, as in GPT-OSS."""
    return {
        "vocab_size": 50257, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 64, "intermediate_size": hidden, "num_experts": experts,
        "num_experts_per_tok": 2, "tie_word_embeddings": True, "reasoning_effort": dict(_EFFORT),
    }  # fmt: skip


def _gpt_oss(layers: int, experts: int) -> dict:
    """The published configurations of gpt-oss-20b and gpt-oss-120b."""
    return {
        "vocab_size": 201088, "hidden_size": 2880, "num_hidden_layers": layers, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_experts": experts,
        "num_experts_per_tok": 4, "sliding_window": 128, "max_position_embeddings": 131072,
        "initial_context_length": 4096, "rope_theta": 150000.0, "rope_scaling_factor": 32.0,
    }  # fmt: skip


PRESETS: dict[str, dict] = {
    # No two dimensions are equal, so a swapped axis fails at once; YaRN and the window are within reach of a short test.
    "tiny": {
        "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 96, "num_experts": 10, "num_experts_per_tok": 3,
        "sliding_window": 8, "max_position_embeddings": 512, "initial_context_length": 32, "rope_scaling_factor": 16.0,
        "reasoning_effort": {"low": 1, "medium": 3, "high": 5},
    },
    "ultra_light": _small(512, 12, 8, 2, 16),
    "light": _small(640, 16, 10, 2, 24),
    "standard": _small(768, 20, 12, 4, 32),
    "performance": _small(896, 22, 14, 2, 48),
    "gpt_oss_20b": _gpt_oss(24, 32),
    "gpt_oss_120b": _gpt_oss(36, 128),
}  # fmt: skip
ModelConfig.PRESETS = PRESETS


def preset(name: str, **changes) -> ModelConfig:
    """The preset `name` with some fields changed: `preset("tiny", num_experts=12)`."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return ModelConfig(**{**PRESETS[name], **changes})
