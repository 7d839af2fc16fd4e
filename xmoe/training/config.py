"""What a run is made from: `RunConfig`, and its `train` section.

The other sections stand at the top of the modules that obey them: `model` in :mod:`xmoe.model.config`, `data` in
:mod:`xmoe.data.stream`, `optim`, `log` and `lora` in :mod:`~xmoe.training.optim`, :mod:`~xmoe.training.metrics` and
:mod:`~xmoe.training.adapters`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from xmoe.checkpoint.opened import Checkpoint
from xmoe.data.stream import DataConfig
from xmoe.errors import ConfigError
from xmoe.model.adapter import adapted
from xmoe.model.config import ModelConfig
from xmoe.training.adapters import LoRAConfig
from xmoe.training.metrics import LogConfig
from xmoe.training.optim import OptimConfig


@dataclass(frozen=True)
class TrainConfig:
    """The `train` section of a run: how long, how much at once, which losses, when to look and to save."""

    steps: int = 1000
    micro_batch: int = 8  # sequences in one forward pass
    grad_accum: int = 1  # forward passes in one step
    init_from: str | None = None  # a checkpoint (folder or hub name) to start from: its shape, weights and tokenizer
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # bfloat16: autocast, weights stay float32
    activation_checkpointing: bool = (
        False  # keep block inputs only and compute the rest again: less memory, a third more time
    )
    load_balancing_coef: float = 0.01
    z_loss_coef: float = 0.001
    selection_bias_rate: float = 0.0  # above 0: balance by a bias in the choice, as well as or instead of by a loss
    effort_sampling: Literal["none", "step", "layer"] = (
        "none"  # draw experts per token for each step, or for each layer of it
    )
    effort_weights: dict[str, float] = field(default_factory=lambda: {"low": 0.1, "medium": 0.2, "high": 0.7})
    validate_every: int = 100
    save_every: int = 500
    keep_saves: int = 1  # resume points that stay on disk
    spike_nats: float = 2.0  # stop when a step's loss lies this far above its running average; 0: never

    ALIASES: ClassVar[dict[str, str]] = {
        "init_checkpoint": "init_from",
        "pretrained": "init_from",
        "checkpoint": "init_from",
        "model_name_or_path": "init_from",
        "max_steps": "steps",
        "max_iters": "steps",
        "num_steps": "steps",
        "batch_size": "micro_batch",
        "micro_batch_size": "micro_batch",
        "per_device_train_batch_size": "micro_batch",
        "gradient_accumulation_steps": "grad_accum",
        "accumulation_steps": "grad_accum",
        "dtype": "precision",
        "aux_loss_coef": "load_balancing_coef",
        "aux_loss": "load_balancing_coef",
        "lb_loss": "load_balancing_coef",
        "router_aux_loss_coef": "load_balancing_coef",
        "router_z_loss": "z_loss_coef",
        "router_z_loss_coef": "z_loss_coef",
        "gradient_checkpointing": "activation_checkpointing",
        "eval_interval": "validate_every",
        "eval_every": "validate_every",
        "eval_steps": "validate_every",
        "save_steps": "save_every",
        "checkpoint_every": "save_every",
        "save_total_limit": "keep_saves",
    }

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch", "grad_accum", "validate_every", "save_every", "keep_saves"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("load_balancing_coef", "z_loss_coef", "selection_bias_rate", "spike_nats"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; expected 0 or more")
        if any(not weight >= 0 for weight in self.effort_weights.values()) or not sum(self.effort_weights.values()) > 0:
            raise ConfigError(f"train.effort_weights is {self.effort_weights}; expected shares of 0 or more, not all 0")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made from; `run.yaml` in a run folder is one of these, resolved.

    Without a `model` section the shape is that of `train.init_from`. With a `lora` section that model stays as it is, and
    adapters beside it are trained and saved.
    """

    model: ModelConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    lora: LoRAConfig | None = None

    def __post_init__(self) -> None:
        if self.model is None:
            if self.train.init_from is None:
                raise ConfigError(
                    "model is missing: a section with a preset or with sizes, or a checkpoint in train.init_from"
                )
            object.__setattr__(self, "model", Checkpoint(self.train.init_from).config)
        if self.lora is not None and self.train.init_from is None:
            raise ConfigError(
                "lora trains adapters beside a model that is there; name its checkpoint in train.init_from"
            )
        if self.lora is not None and self.train.selection_bias_rate:
            raise ConfigError("train.selection_bias_rate would change the model that lora leaves as it is; set it to 0")
        if self.lora is not None:
            adapted(self.lora.settings, self.model.num_hidden_layers)  # says which layer is not there
        longest, table = self.model.max_position_embeddings, self.model.reasoning_effort
        if self.data.seq_len > longest:
            raise ConfigError(
                f"data.seq_len is {self.data.seq_len}, longer than the model's context of {longest}; "
                "shorten it or raise model.max_position_embeddings"
            )
        if self.train.effort_sampling != "none":
            unknown = set(self.train.effort_weights) - set(table or {})
            if unknown:
                raise ConfigError(
                    f"train.effort_sampling draws {', '.join(sorted(unknown))}, which model.reasoning_effort does not list; "
                    f"it has {table}; for example {{low: 1, medium: 2, high: 4}}"
                )
