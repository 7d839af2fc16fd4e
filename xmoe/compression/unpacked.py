"""Packed experts while they are trained: decoded to fp32, and encoded again in the form they had.

A number format becomes its decoded values, a low-rank weight its two factors, a mixed one those of every part; each is a
parameter. What the kernels see is composed of them before every pass: factors are multiplied out, parts put together, and
values of a number format rounded to what its codes and the scales it has can hold, so that training knows what will be
stored. Gradients pass the rounding as if it were not there ("straight-through", arXiv 1308.3432): the parameters go on in
fp32, and add up steps too small to be seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from xmoe.model.experts import Experts
from xmoe.model.transformer import Transformer
from xmoe.quantization.compound import MixedWeight, PackedFactors
from xmoe.quantization.packed import PackedWeight

_NAMES = ("gate_up", "down")
_TRAINED, _COMPOSED = 16, 8
"""Bytes: a parameter has value, gradient and two moments in fp32, what the kernels see value and gradient."""


class Held:
    """A weight in the place of whose packed form stand fp32 parameters.

    Attributes:
        parameters: to be trained.
    """

    def __init__(self, weight: Tensor | PackedWeight):
        self._weight = weight.map(lambda t: t) if isinstance(weight, PackedWeight) else weight  # in the file's order
        self._within: list[Held] = []
        self.parameters: list[nn.Parameter] = []
        if isinstance(weight, MixedWeight):
            self._within = [Held(stack) for stack in weight.parts.values()]
        elif isinstance(weight, PackedWeight) and weight.factors:
            self._within = [Held(factor) for factor in weight.factors]
        else:
            dense = weight.decode(dtype=torch.float32) if isinstance(weight, PackedWeight) else weight.detach().float()
            self.parameters = [nn.Parameter(dense.clone() if dense is weight else dense)]
        for part in self._within:
            self.parameters += part.parameters

    def compose(self, rounded: bool = True) -> Tensor:
        """The dense stack [E, out, in] that the parameters mean now; gradients flow back through it.

        rounded: to what can be stored, where the weight is held in a packed number format.
        """
        if not self._within:
            (whole,) = self.parameters
            if not rounded or not isinstance(self._weight, PackedWeight):
                return whole
            with torch.no_grad():
                change = self._weight.snap(whole).sub_(whole)
            return whole + change
        parts = [part.compose(rounded) for part in self._within]
        if not isinstance(self._weight, MixedWeight):
            return torch.bmm(*parts)
        order = [e for ids in self._weight.members.values() for e in ids]
        places = torch.tensor(order, device=parts[0].device).argsort()
        return torch.cat(parts)[places]

    @torch.no_grad()
    def encode(self) -> Tensor | PackedWeight:
        """The parameters in the form that the weight had."""
        weight, made = self._weight, [part.encode() for part in self._within]
        if isinstance(weight, MixedWeight):
            return MixedWeight(weight.part, dict(zip(weight.members, made)))
        if isinstance(weight, PackedFactors):
            return PackedFactors(*made)
        if made:
            return PackedWeight("low-rank", dict(zip(("left", "right"), made)))
        dense = self.parameters[0].detach()
        return weight.encode_at(dense) if isinstance(weight, PackedWeight) else dense.to(weight.dtype)


class Unpacked:
    """All packed experts of a model, held as :class:`Held`; :meth:`compose` before every pass."""

    def __init__(self, model: Transformer):
        self._places: list[tuple[Experts, str, Held]] = []
        for block in model.blocks:
            for name in _NAMES:
                weight = getattr(block.moe.experts, name)
                if isinstance(weight, PackedWeight):
                    self._places.append((block.moe.experts, name, Held(weight)))
                    delattr(block.moe.experts, name)
        self.compose()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for _, _, held in self._places for p in held.parameters]

    def compose(self, rounded: bool = True) -> None:
        """Give the kernels the weights that the parameters mean now; see :meth:`Held.compose`."""
        for experts, name, held in self._places:
            experts.__dict__[name] = held.compose(rounded)  # not registered: it is no parameter of the model

    def encode(self) -> None:
        """Put the experts back in the forms they had."""
        for experts, name, held in self._places:
            experts.__dict__.pop(name, None)
            setattr(experts, name, held.encode())
        self._places = []


@contextlib.contextmanager
def unpacked(model: Transformer, wanted: bool) -> Iterator[Unpacked | None]:
    """The packed experts of `model` as parameters while the block runs, encoded again behind it.

    None, and nothing changes, where `wanted` is false or no expert is packed.
    """
    if not wanted or not formats(model):
        yield None
        return
    held = Unpacked(model)
    try:
        yield held
    finally:
        held.encode()


def formats(model: Transformer) -> list[str]:
    """Packed formats of the experts, each once."""
    weights = [getattr(block.moe.experts, name) for block in model.blocks for name in _NAMES]
    stacks = [s for w in weights for s in (w.parts.values() if isinstance(w, MixedWeight) else [w])]
    return list(dict.fromkeys(s.format for s in stacks if isinstance(s, PackedWeight)))


def memory(model: Transformer) -> int:
    """Bytes that training the packed experts takes beside the model: parameters in fp32, gradients, moments, products."""
    total = 0
    for block in model.blocks:
        for weight in (getattr(block.moe.experts, name) for name in _NAMES):
            if isinstance(weight, PackedWeight):
                whole = weight.shape[0] * weight.shape[1] * weight.shape[2]
                total += weight.count * _TRAINED + whole * _COMPOSED
    return total
