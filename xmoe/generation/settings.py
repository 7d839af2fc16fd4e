"""What a caller may ask of a run: GenerationConfig, and the sorting of keyword settings into it and SamplingConfig."""

from __future__ import annotations

from dataclasses import dataclass, fields

from xmoe.errors import ConfigError
from xmoe.generation.sampling import SamplingConfig
from xmoe.model.config import EFFORTS


@dataclass(frozen=True)
class GenerationConfig:
    """When to stop, and how to run.

    max_new_tokens: the most tokens to generate.
    stop: strings that end the text; they are not part of it.
    stop_tokens: ids that end it; None means the tokenizer's end-of-document token.
    num_experts_per_tok: how many experts each token visits, set outright; None leaves it to `reasoning_effort`.
    reasoning_effort: low, medium or high, for models whose config has a table from effort to experts.
    prefill_chunk: prompt tokens per forward pass; bounds memory, changes nothing else.
    overflow: what to do with a prompt that fills the context: "error", or "truncate" (forget its beginning).
    """

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] | None = None
    num_experts_per_tok: int | None = None
    reasoning_effort: str | None = None
    prefill_chunk: int = 512
    overflow: str = "error"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.stop_tokens is not None:
            object.__setattr__(self, "stop_tokens", frozenset(self.stop_tokens))
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more")
        if self.prefill_chunk < 1:
            raise ConfigError(f"prefill_chunk is {self.prefill_chunk}; expected 1 or more")
        if "" in self.stop:
            raise ConfigError("a stop string is empty; expected at least one character")
        if self.overflow not in ("error", "truncate"):
            raise ConfigError(f"overflow is {self.overflow!r}; expected error or truncate")


def read_settings(settings: dict) -> tuple[GenerationConfig, SamplingConfig]:
    """Sorts keyword settings into the two configs; ConfigError on a name neither knows."""
    own = {f.name for f in fields(GenerationConfig)}
    chosen = {f.name for f in fields(SamplingConfig)}
    for name in settings:
        if name not in own | chosen:
            raise ConfigError(f"unknown setting {name!r}; known: {', '.join(sorted(own | chosen))}")
    return (
        GenerationConfig(**{n: v for n, v in settings.items() if n in own}),
        SamplingConfig(**{n: v for n, v in settings.items() if n in chosen}),
    )


def experts_per_token(
    config, num_experts_per_tok: int | None = None, reasoning_effort: str | None = None
) -> int | None:
    """K for this run: the number given, else the effort's row in the model's table, else None (the model's own K)."""
    if num_experts_per_tok is not None:
        fewest = min(config.experts_in_layer(layer) for layer in range(config.num_hidden_layers))
        if not 1 <= num_experts_per_tok <= fewest:
            raise ConfigError(
                f"num_experts_per_tok is {num_experts_per_tok}; this model has {fewest} experts a layer: "
                f"expected 1 to {fewest}"
            )
        return num_experts_per_tok
    if reasoning_effort is None:
        return None
    if reasoning_effort not in EFFORTS:
        raise ConfigError(f"unknown reasoning effort {reasoning_effort!r}; expected {', '.join(EFFORTS)}")
    if not config.reasoning_effort or reasoning_effort not in config.reasoning_effort:
        raise ConfigError(
            f"this model's config gives no number of experts for reasoning effort {reasoning_effort!r}; "
            "set num_experts_per_tok instead (for GPT-OSS, effort is a line of the Harmony system message)"
        )
    return config.reasoning_effort[reasoning_effort]
