"""Stops a run that has gone wrong before the damage reaches the weights, and says where it began.

Two signs: a loss or gradient that is no finite number, and a loss that jumps far above its own recent average. The check
stands between the backward pass and the update, so the weights in memory, and on disk, are still those of the step before.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from xmoe.errors import XmoeError

MEMORY = 0.9  # of the running averages: about the last ten steps
SETTLE = 20  # steps before averages mean anything


class Diverged(XmoeError):
    """The run went wrong; the message names the step, the layer and what to try."""


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """Gradient norm of each part: `embed`, `blocks.0`, ..., `norm`, `head`; 0-dim tensors, in forward order."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            pieces = name.split(".")
            parts.setdefault(".".join(pieces[:2]) if pieces[0] == "blocks" else pieces[0], []).append(parameter.grad)
    return {name: torch.nn.utils.get_total_norm(gradients) for name, gradients in parts.items()}


class Guard:
    """Watches loss and gradients of every step.

    Args:
        spike_nats: how far above its running average a step's loss may lie; 0 turns that check off.
    """

    def __init__(self, spike_nats: float) -> None:
        self.spike_nats = spike_nats
        self.seen = 0
        self.average: dict[str, float] = {}

    def check(
        self, step: int, loss: float, norms: dict[str, Tensor], model: nn.Module, again: Callable[[], object]
    ) -> None:
        """Raise :class:`Diverged` where step number `step` must not be applied.

        Args:
            norms: what `gradient_norms` gave.
            again: runs the step's forward pass once more, so that the layer at fault can be watched.
        """
        values = {name: float(norm) for name, norm in norms.items()}
        if not math.isfinite(loss):
            raise Diverged(f"step {step}: the loss is {loss}; {_blame_forward(model, again)}")
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:  # the backward pass runs from the last layer to the first, so the last in forward order was first
            what = _name_gradient(model, wrong[-1])
            raise Diverged(
                f"step {step}: the loss is {loss:.4f} but gradients are not finite, first in {what}; {ADVICE}"
            )
        usual = self.average.get("loss", loss)
        if self.spike_nats and self.seen >= SETTLE and loss > usual + self.spike_nats:
            layer = max(values, key=lambda name: values[name] / (self.average.get(name, 0.0) + 1e-12))
            ratio = values[layer] / (self.average.get(layer, 0.0) + 1e-12)
            raise Diverged(
                f"step {step}: the loss jumped to {loss:.4f} from about {usual:.4f}; the gradient that grew most is in {layer} "
                f"({ratio:.1f} times its usual norm); {ADVICE}, or raise train.spike_nats (now {self.spike_nats:g})"
            )
        self.seen += 1
        for name, value in (("loss", loss), *values.items()):
            self.average[name] = MEMORY * self.average.get(name, value) + (1 - MEMORY) * value

    def state_dict(self) -> dict:
        return {"seen": self.seen, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.seen, self.average = state["seen"], state["average"]


ADVICE = "try a lower optim.lr or a longer optim.warmup_steps, and resume from the last save"


def _blame_forward(model: nn.Module, again: Callable[[], object]) -> str:
    """Say which weight, or else which module's output, is the first that is not finite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the weight {name} is not finite; {ADVICE}"
    culprit: list[str] = []

    def watch(name: str):
        def hook(_module, _inputs, output) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not culprit and any(isinstance(t, Tensor) and not torch.isfinite(t).all() for t in tensors):
                culprit.append(name)

        return hook

    # A child's output is seen before its parent's, so the first one seen is the innermost.
    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            again()
    finally:
        for hook in hooks:
            hook.remove()
    if culprit:
        return f"the first activations that are not finite come out of {culprit[0]}; {ADVICE}"
    return f"every layer's activations are finite, so it arose in the loss itself; {ADVICE}"


def _name_gradient(model: nn.Module, part: str) -> str:
    names = [
        name
        for name, parameter in model.named_parameters()
        if name.startswith(part + ".") and parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    return names[-1] if len(names) == 1 else f"{part} ({len(names)} tensors)"
