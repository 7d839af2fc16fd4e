"""How the weights move: parameter groups, AdamW, Muon per expert, and the learning-rate schedule.

Every parameter has one of four roles, read from its name (`role`):

| role     | which                                           | weight decay | under `name: muon` |
|----------|-------------------------------------------------|--------------|--------------------|
| `matrix` | attention projections, expert stacks, adapters  | yes          | Muon               |
| `table`  | embedding and head: one row a token             | no           | AdamW              |
| `router` | router weight and bias                          | no           | AdamW              |
| `vector` | norms, sinks and every bias, stacked ones too   | no           | AdamW              |

Decay shrinks a row a little on every step, whether or not it was used. A dense matrix is used by every token, so decay and
gradient balance; the row of a rare token would merely be worn away. A decayed router drifts towards equal logits, which looks
like balance and is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from xmoe.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class OptimConfig:
    """The `optim` section of a run.

    `lr` is the peak rate of AdamW. `muon_lr` is the peak rate of the matrices under Muon; Muon's updates are scaled to the
    root mean square that AdamW's usually have (`orthogonal_scale`), so the two rates are of one kind and `muon_lr` may be
    left out. Small models gain from a `muon_lr` of two or three times `lr`.
    """

    name: Literal["muon", "adamw"] = "muon"
    lr: float = 2e-3
    muon_lr: float | None = None  # None: the same as lr
    weight_decay: float = 0.1  # per unit of learning rate, decoupled, on matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95  # Muon's
    schedule: Literal["wsd", "cosine"] = "wsd"  # wsd: warm-up, flat, linear down
    warmup_steps: int = 50
    decay_fraction: float = 0.4  # wsd: the last part of the run in which the rate falls
    min_lr_fraction: float = 0.02  # where the schedule ends, as a fraction of the peak
    grad_clip: float = 1.0  # largest global gradient norm; 0 leaves gradients alone

    ALIASES: ClassVar[dict[str, str]] = {
        "learning_rate": "lr",
        "max_lr": "lr",
        "min_lr": "min_lr_fraction",
        "optimizer": "name",
        "lr_schedule": "schedule",
        "scheduler": "schedule",
        "warmup": "warmup_steps",
        "max_grad_norm": "grad_clip",
        "clip_grad": "grad_clip",
        "betas": "beta1",
    }

    def __post_init__(self) -> None:
        for field in ("lr", "eps"):
            if not getattr(self, field) > 0:
                raise ConfigError(
                    f"optim.{field} is {getattr(self, field)}; expected a number above 0, for example 1e-3"
                )
        if self.muon_lr is not None and not self.muon_lr > 0:
            raise ConfigError(
                f"optim.muon_lr is {self.muon_lr}; expected a number above 0, or nothing to follow optim.lr"
            )
        for field in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(f"optim.{field} is {getattr(self, field)}; expected a number from 0 up to but not 1")
        for field in ("decay_fraction", "min_lr_fraction"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"optim.{field} is {getattr(self, field)}; expected a fraction between 0 and 1")
        for field in ("weight_decay", "warmup_steps", "grad_clip"):
            if getattr(self, field) < 0:
                raise ConfigError(f"optim.{field} is {getattr(self, field)}; expected 0 or more")


def lr_fraction(step: int, total_steps: int, config: OptimConfig) -> float:
    """The learning rate of `step` (from 0) as a fraction of the peak.

    Warm-up rises linearly and reaches 1 on step `warmup_steps - 1`. Cosine then falls along half a wave to `min_lr_fraction` at
    the last step; wsd (warm-up, stable, decay; also called trapezoid) stays at 1 and falls linearly over the last
    `decay_fraction` of the run. It depends on nothing but its arguments, so resuming needs no schedule state.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    floor = config.min_lr_fraction
    if config.schedule == "cosine":
        start = min(config.warmup_steps, total_steps - 1)
        progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - 1 - start)))
        fall = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    else:
        length = max(1.0, config.decay_fraction * total_steps)
        left = (total_steps - 1 - step) / length if config.decay_fraction else 1.0
        fall = floor + (1 - floor) * min(1.0, max(0.0, left))
    return warm * fall


def role(name: str, parameter: Tensor) -> str:
    """`matrix`, `table`, `router` or `vector`; see the table at the top of this file.

    The name decides, not the shape alone: an expert bias is a [E, D] stack of vectors, two-dimensional but no matrix.
    """
    parts = name.split(".")
    if "router" in parts:
        return "router"
    if "embed" in parts or "head" in parts:
        return "table"
    if parameter.ndim < 2 or parts[-1].endswith("bias"):
        return "vector"
    return "matrix"


def newton_schulz(gradient: Tensor, steps: int = 5) -> Tensor:
    """Replace each matrix U S V' in the last two dimensions of `gradient` by roughly U V', in bfloat16.

    Shapes: [..., rows, cols] in and out; leading dimensions are independent matrices, so an expert stack [E, rows, cols] is
    orthogonalised expert by expert. A zero matrix (an expert that saw no token) stays zero. The quintic a x + b x^3 + c x^5
    pushes every singular value into about [0.7, 1.2] within five steps; exactness there does not help training
    (K. Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks").
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    rows, cols = gradient.shape[-2:]
    x = gradient.reshape(-1, rows, cols)
    if rows > cols:  # the Gram matrix below then has the smaller side
        x = x.mT
    # A norm of at least every singular value; taken in float32, where a sum of many squares keeps its digits.
    x = (x / (torch.linalg.matrix_norm(x.float(), keepdim=True) + 1e-7)).bfloat16().contiguous()
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    if rows > cols:
        x = x.mT
    return x.reshape(gradient.shape)


def orthogonal_scale(rows: int, cols: int) -> float:
    """0.2 sqrt(max(rows, cols)): gives an orthogonalised update the root mean square 0.2 of AdamW's (arXiv 2502.16982, eq. 4)."""
    return 0.2 * math.sqrt(max(rows, cols))


class Muon(torch.optim.Optimizer):
    """Nesterov momentum in float32, orthogonalised over the last two dimensions, with decoupled weight decay.

    Takes matrices [rows, cols] and stacks of them [E, rows, cols]. (`torch.optim.Muon` refuses stacks.)
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update from the gradients; parameters without a gradient stay as they are."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.float()
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(gradient)
                momentum = state["momentum"].mul_(group["momentum"]).add_(gradient)
                update = newton_schulz(gradient.add(momentum, alpha=group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                size = group["lr"] * orthogonal_scale(*parameter.shape[-2:])
                parameter.add_(update.to(parameter.dtype), alpha=-size)


class Optimizer:
    """Everything that moves a model's weights: AdamW, Muon beside it where asked for, clipping and the schedule.

        optimizer = Optimizer(model, OptimConfig(), total_steps=1000)
        loss.backward()
        optimizer.step(step=0)          # sets the rate of that step, updates, clears the gradients

    Parameters with `requires_grad=False` are left out, so a frozen model with adapters costs no optimizer memory.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.names: dict[str, list[str]] = {"matrix": [], "table": [], "router": [], "vector": []}
        by_role: dict[str, list[nn.Parameter]] = {name: [] for name in self.names}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.names[role(name, parameter)].append(name)
                by_role[role(name, parameter)].append(parameter)
        self.parameters = [parameter for group in by_role.values() for parameter in group]
        if not self.parameters:
            raise ConfigError("no parameter of the model asks for a gradient; there is nothing to train")

        matrices = by_role.pop("matrix")
        others = [parameter for group in by_role.values() for parameter in group]
        muon_lr = config.lr if config.muon_lr is None else config.muon_lr
        self.parts: dict[str, torch.optim.Optimizer] = {}
        groups = [{"params": others, "weight_decay": 0.0}] if others else []
        if config.name == "muon" and matrices:
            self.parts["muon"] = Muon(matrices, muon_lr, config.momentum, config.weight_decay)
        elif matrices:
            groups.append({"params": matrices, "weight_decay": config.weight_decay})
        if groups:
            self.parts["adamw"] = torch.optim.AdamW(
                groups,
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                fused=self.parameters[0].device.type in ("cpu", "cuda", "mps"),
            )
        self._peak = {"adamw": config.lr, "muon": muon_lr}

    def lr(self, step: int) -> float:
        """AdamW's learning rate at `step` (counted from 0)."""
        return self.config.lr * lr_fraction(step, self.total_steps, self.config)

    def clip(self, norm: Tensor) -> None:
        """Scale all gradients so that their global norm, which the caller has measured, is at most `grad_clip`."""
        if self.config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm)

    def step(self, step: int) -> None:
        """Update every weight with the rate of `step` (from 0), then drop the gradients."""
        fraction = lr_fraction(step, self.total_steps, self.config)
        for name, part in self.parts.items():
            for group in part.param_groups:
                group["lr"] = self._peak[name] * fraction
            part.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        """Momenta and step counts, by part, and the parameter names they belong to."""
        return {"names": self.names, "parts": {name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` gave; refuses the state of other parameters or of another optimizer."""
        if set(state["parts"]) != set(self.parts):
            raise CheckpointError(
                f"the saved optimizer is {'+'.join(sorted(state['parts']))}, this run's is {'+'.join(sorted(self.parts))}; "
                "resume with the optim.name the run was started with"
            )
        if state["names"] != self.names:
            raise CheckpointError(
                "the saved optimizer belongs to a model with other parameters; resume with the run's own run.yaml"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
