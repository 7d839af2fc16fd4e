"""Ways in which GPT-OSS is easily misread: each, put into the model on purpose, must move the logits measurably.

This is the proof that the comparison with transformers can fail. For every misreading the distance to transformers'
logits has to exceed ten times the bound of test_transformer.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from xmoe.kernels import dispatch, reference
from xmoe.model import rope
from xmoe.model.config import FULL, SLIDING, preset
from xmoe.model.router import Router, Routing

CONFIG = preset("tiny", sliding_window=16, num_experts=8, num_experts_per_tok=4, num_attention_heads=8, head_dim=20)


def swiglu_with(halves=False, swapped=False, clamp=True, alpha=1.702, one=1.0, lower=False):
    def swiglu(gate_up, limit=7.0, _alpha=1.702):
        gate, up = gate_up.chunk(2, -1) if halves else (gate_up[..., 0::2], gate_up[..., 1::2])
        gate, up = (up, gate) if swapped else (gate, up)
        if clamp:
            gate = gate.clamp(-limit if lower else None, limit)
            up = up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + one)

    return swiglu


def attention_with(shift=0, no_sinks=False, tile=False):
    true = reference.attention

    def attention(q, k, v, sinks, *, window=None, **rest):
        if tile:  # query head h reads key-value head h % G instead of h // (H / G)
            H, G = q.shape[2], k.shape[2]
            k, v = (t.repeat(1, 1, H // G, 1) for t in (k, v))
        return true(q, k, v, None if no_sinks else sinks, window=window and window + shift, **rest)

    return attention


def interleaved_rope(x, cos, sin):
    x1, x2 = x.float()[..., 0::2], x.float()[..., 1::2]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2).to(x.dtype)


def norm_without_weight_in_fp32(x, weight, eps):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight + 1.0, eps)  # the "+1" of other models


def full_softmax(self, x, num_experts_per_tok=None):
    logits = torch.nn.functional.linear(x, self.weight, self.bias)
    indices = logits.topk(num_experts_per_tok or self.num_experts_per_tok).indices
    return Routing(logits, indices, logits.softmax(-1).gather(-1, indices))


def rounded_bounds(config, true=rope.yarn_bounds):
    low, high = true(config)
    return float(math.floor(low)), float(math.ceil(high))


def no_yarn(config):
    return 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)


TRANSFORMER = "xmoe.model.transformer"
MISREADINGS = {
    "odd layers slide": (CONFIG, None, None, None),
    "window of one key more": (CONFIG, reference, "attention", attention_with(shift=1)),
    "window of one key less": (CONFIG, reference, "attention", attention_with(shift=-1)),
    "no sinks": (CONFIG, reference, "attention", attention_with(no_sinks=True)),
    "key-value heads tiled": (CONFIG, reference, "attention", attention_with(tile=True)),
    "interleaved rotary pairs": (CONFIG, reference, "rope", interleaved_rope),
    "no YaRN": (CONFIG, TRANSFORMER, "inverse_frequencies", no_yarn),
    "no concentration": (CONFIG, TRANSFORMER, "concentration", lambda config: 1.0),
    "YaRN bounds rounded": (CONFIG, rope, "yarn_bounds", rounded_bounds),
    "gate and up as halves": (CONFIG, reference, "swiglu", swiglu_with(halves=True)),
    "gate and up swapped": (CONFIG, reference, "swiglu", swiglu_with(swapped=True)),
    "no clamp": (CONFIG, reference, "swiglu", swiglu_with(clamp=False)),
    "alpha 1": (CONFIG, reference, "swiglu", swiglu_with(alpha=1.0)),
    "alpha 1.7": (CONFIG, reference, "swiglu", swiglu_with(alpha=1.7)),
    "no +1 on up": (CONFIG, reference, "swiglu", swiglu_with(one=0.0)),
    "softmax over all, not renormalised": (CONFIG, Router, "forward", full_softmax),
    "norm weight plus one": (CONFIG, reference, "rms_norm", norm_without_weight_in_fp32),
}


@pytest.mark.parametrize("name", MISREADINGS)
def test_a_misreading_shows(name, random_model, peer, monkeypatch):
    config, where, what, wrong = MISREADINGS[name]
    model = random_model(config)
    for block in model.blocks:  # wide enough that the clamps bite
        block.moe.experts.gate_up.data.mul_(4)
    theirs = peer(model)
    tokens = torch.randint(config.vocab_size, (1, 120), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), dispatch.use("reference"):
        expected = theirs(tokens).logits
        assert (model(tokens).logits - expected).abs().max() < 1e-4
        if where is None:
            swapped = tuple(FULL if t == SLIDING else SLIDING for t in config.layer_types)
            for block, kind in zip(model.blocks, swapped):
                block.attn.window = config.sliding_window if kind == SLIDING else None
        else:
            target = where if not isinstance(where, str) else __import__(where, fromlist=["_"])
            monkeypatch.setattr(target, what, wrong)
            model._inverse, model._concentration = None, __import__(TRANSFORMER, fromlist=["_"]).concentration(config)
        wrong_logits = model(tokens).logits
    assert (wrong_logits - expected).abs().max() > 1e-3


def test_a_lower_clamp_on_the_gate_shows_where_precision_allows():
    """gate * sigmoid(1.702 gate) is nearly 0 below -7, so logits hardly move; the activation itself tells."""
    x = torch.tensor([-8.0, 0.5, 8.0, -9.0, 1.0, 0.0, 0.5, 10.0])
    expected = torch.tensor([-1.46496e-5, -41.999719, 0.84579577, 2.8031075])
    torch.testing.assert_close(reference.swiglu(x), expected, atol=1e-9, rtol=1e-5)
    lower = swiglu_with(lower=True)(x)
    assert abs(lower[0] - expected[0]) > 1e-5
