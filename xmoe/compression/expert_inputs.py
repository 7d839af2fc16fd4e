"""What the experts of a layer are fed: the inputs of gate_up, and behind it the inputs of down, expert by expert.

Means over inputs weigh a token by g^2, g its routing weight: what an expert says is multiplied by g before it is added, and
so is every error in it. All sums run in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from xmoe.compression.layerwise import Batch, Visit, walk
from xmoe.compression.reconstruction import expert_output
from xmoe.model.experts import MoE
from xmoe.model.transformer import Transformer
from xmoe.quantization.packed import matrices

_ROWS = 4096  # rows that exist in float64 at a time
_RIDGE = 1e-8  # of the mean eigenvalue: keeps a second moment positive definite and changes nothing else


class LayerInputs:
    """MoE inputs of some tokens in one layer, and which of them each expert gets.

    Args:
        moe: the layer, as it routes and computes now.
        inputs: [N, D], all of them real tokens.
    """

    def __init__(self, moe: MoE, inputs: Tensor):
        self.moe = moe
        self.inputs = inputs.to(moe.router.weight.device)
        self.routing = moe.router(self.inputs.to(moe.router.weight.dtype))

    def of(self, e: int) -> tuple[Tensor, Tensor]:
        """Inputs [n, D] of the tokens routed to expert e, and their routing weights [n]."""
        token, slot = (self.routing.indices == e).nonzero(as_tuple=True)
        return self.inputs[token], self.routing.weights[token, slot]

    def hidden(self, e: int, x: Tensor) -> Tensor:
        """What expert e hands from gate_up to down for inputs x: [n, F] in fp32."""
        return expert_output(self.moe.experts, e, x)[0]

    def moments(self, e: int) -> tuple[Tensor, Tensor, int]:
        """Second moments of what gate_up [D, D] and down [F, F] of expert e are fed, and how many tokens are behind them.

        With fewer tokens than inputs d, a second moment knows nothing of most directions. It is then mixed with that of
        all tokens of the layer (as if they had all been sent to e) in the share 1 - n / d; and that one, where all N
        tokens are fewer than d, with the identity in the share 1 - N / d. Both are positive definite.
        """
        x, g = self.of(e)
        shape = self.inputs.shape[0]
        own = second_moment(x, g), second_moment(self.hidden(e, x), g)
        everything = (
            lambda: self._all,
            lambda: second_moment(self.hidden(e, self.inputs), None),
        )
        both = [mixed(m, len(x), pooled, shape) for m, pooled in zip(own, everything)]
        return both[0], both[1], len(x)

    def norms(self, e: int, weighted: bool) -> dict[str, Tensor]:
        """Length of every input of gate_up [D] and of down [F] over the tokens of expert e, times g where `weighted`.

        Of a low-rank weight those of its factors: `gate_up.right` is fed the inputs, `gate_up.left` what right makes of
        them. An expert that no token is sent to counts as if it had got one, the average of all.
        """
        x, g = self.of(e)
        if not len(x):
            x, g = self.inputs, torch.full((len(self.inputs),), len(self.inputs) ** -0.5, device=self.inputs.device)
        elif not weighted:
            g = torch.ones_like(g)
        found = {}
        for name, fed in (("gate_up", x), ("down", self.hidden(e, x))):
            *outer, inner = matrices(getattr(self.moe.experts, name), e, torch.float32)
            found[f"{name}.right" if outer else name] = _square_sums(fed, g).sqrt().float()
            if outer:
                found[f"{name}.left"] = _square_sums(fed.float() @ inner.T, g).sqrt().float()
        return found

    @cached_property
    def _all(self) -> Tensor:
        return second_moment(self.inputs, None)


def _pieces(rows: Tensor, weights: Tensor | None):
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS].to("cpu" if rows.device.type == "mps" else rows.device).double()
        yield part if weights is None else part * weights[start : start + _ROWS].to(part).unsqueeze(1)


def _square_sums(rows: Tensor, weights: Tensor) -> Tensor:
    return sum(part.square().sum(0) for part in _pieces(rows, weights)).to(rows.device)


def second_moment(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of g^2 x x^T over rows x [n, d], divided by the sum of g^2: float64 [d, d]; zeros where there are no rows."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in _pieces(rows, weights):
        total = total.to(part.device).addmm_(part.T, part)
    mass = len(rows) if weights is None else float(weights.double().square().sum())
    return total / mass if mass else total


def mixed(moment: Tensor, count: int, everything: Callable[[], Tensor], all_count: int) -> Tensor:
    """A positive definite second moment; see :meth:`LayerInputs.moments`."""
    d = len(moment)
    if count < d:
        pooled = everything().to(moment.device)
        pooled = _toward_identity(pooled, max(0.0, 1 - all_count / d))
        own = count / d
        moment = own * moment + (1 - own) * pooled
    return _toward_identity(moment, _RIDGE)


def _toward_identity(moment: Tensor, share: float) -> Tensor:
    """(1 - share) * moment + share * its mean eigenvalue * identity; the identity itself where the moment is zero."""
    mean = float(moment.trace()) / len(moment)
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return (1 - share) * moment + share * mean * eye if mean > 0 else eye


@torch.no_grad()
def visit_inputs(
    model: Transformer,
    act: Callable[[int, LayerInputs | None], None],
    sample: Tensor | None = None,
    batches: Sequence[Batch] | None = None,
) -> None:
    """Call `act(layer, inputs)` for every layer, first to last; it may change that layer.

    Args:
        sample: MoE inputs [layers, N, D] (`RoutingStats.sample`), used where there are no batches.
        batches: tokens to send through `model`: one layer's inputs are in memory at a time, and all are those of the
            model as it was before `act` changed anything. With neither, inputs are None.
    """
    if batches is None:
        for layer, block in enumerate(model.blocks):
            act(layer, None if sample is None else LayerInputs(block.moe, sample[layer]))
        return

    def visit(layer: int, block, visits) -> None:
        seen: list[Visit] = list(visits)
        act(layer, LayerInputs(block.moe, torch.cat([v.inputs for v in seen])))

    was_training = model.training
    model.eval()
    try:
        walk(model.config, [model.embed(b.tokens) for b in batches], model.blocks, list(batches), visit, norms=False)
    finally:
        model.train(was_training)
