"""A few tokens through all blocks in one call of C, against the modules that it stands for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import randomize
from xmoe.errors import ConfigError
from xmoe.generation.cache import KVCache
from xmoe.kernels import dispatch
from xmoe.kernels.cpu import backend as cpu
from xmoe.kernels.cpu import decode_step
from xmoe.model.attention import Attention
from xmoe.model.config import ModelConfig
from xmoe.model.experts import local_dispatch
from xmoe.model.transformer import Transformer
from xmoe.quantization.packed import PackedWeight
from xmoe.training.adapters import LoRAConfig, add_adapters

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.reason() or "C kernels are there")

CONFIG = ModelConfig(  # a swiglu_limit that random weights reach
    vocab_size=53,
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=64,
    num_experts=7,
    num_experts_per_tok=3,
    sliding_window=5,
    max_position_embeddings=64,
    initial_context_length=32,
    swiglu_limit=0.6,
)  # fmt: skip
DENSE = dataclasses.replace(CONFIG, hidden_size=90, intermediate_size=37)  # dense experts may have any width
EPS = 2e-6  # of the largest logit, in fp32


def dense_model() -> Transformer:
    return randomize(Transformer(DENSE)).eval()


def packed_model(format: str = "mxfp4", **options) -> Transformer:
    model = randomize(Transformer(CONFIG)).eval()
    for block in model.blocks:
        for name in ("gate_up", "down"):
            weight = getattr(block.moe.experts, name).detach()
            block.moe.experts.pack(name, PackedWeight.encode(weight, format, **options))
    return model


def model_with_int8_projections() -> Transformer:
    model = packed_model()
    for block in model.blocks:
        for module, group_size in ((block.attn.qkv, 32), (block.attn.out, 64)):
            module.pack("weight", PackedWeight.encode(module.weight.detach()[None], "int8", group_size=group_size))
    model.head.pack("weight", PackedWeight.encode(model.head.weight.detach()[None], "int8", group_size=32))
    return model


MODELS = {
    "mxfp4": packed_model,
    "int8 projections": model_with_int8_projections,
    "dense": dense_model,
    "int8": lambda: packed_model("int8"),
    "int4 affine": lambda: packed_model("int4", affine=True),
}


class Calls:
    """How often the modules' attention ran; none where the step in C took the tokens."""

    def __init__(self, monkeypatch):
        self.count, plain = 0, Attention.forward

        def counted(*arguments):
            self.count += 1
            return plain(*arguments)

        monkeypatch.setattr(Attention, "forward", counted)


@pytest.fixture
def calls(monkeypatch) -> Calls:
    return Calls(monkeypatch)


def generate(model, chunks, batch=1, padding=0, in_c=True, rollback=0, **options):
    """Outputs of the chunks after the first, which is read as a prompt; one call in C, or from module to module."""
    generator = torch.Generator().manual_seed(7)
    total = sum(chunks)
    tokens = torch.randint(0, model.config.vocab_size, (batch, total), generator=generator)
    pad = torch.arange(batch) * padding
    cache, start, outputs = KVCache(model.config, rollback=rollback), 0, []
    handle = None if in_c else model.blocks[0].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        for size in chunks:
            part = tokens[:, start : start + size]
            positions = (torch.arange(start, start + size) - pad.unsqueeze(1)).clamp(min=-1)
            outputs.append(model(part, cache, positions=positions, **options))
            start += size
    if handle is not None:
        handle.remove()
    return outputs[1:]


def same(found, expected) -> None:
    """Experts that tie up to rounding may stand in either order; where one of them is the last chosen, all else may differ."""
    for a, b in zip(found, expected, strict=True):
        for ours, theirs in zip(a.routing, b.routing, strict=True):
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
            chosen = [theirs.logits.gather(1, routing.indices) for routing in (ours, theirs)]
            torch.testing.assert_close(*chosen, rtol=1e-4, atol=1e-5)
            (mine, order), (others, its_order) = ours.indices.sort(), theirs.indices.sort()
            if not torch.equal(mine, others):
                return
            torch.testing.assert_close(
                ours.weights.gather(1, order), theirs.weights.gather(1, its_order), rtol=1e-4, atol=1e-6
            )
            assert (ours.output_norm is None) == (theirs.output_norm is None)
            if ours.output_norm is not None:
                norms = ours.output_norm.gather(1, order), theirs.output_norm.gather(1, its_order)
                torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-5)
        assert (a.logits - b.logits).abs().max() <= EPS * b.logits.abs().max()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@settings(max_examples=15, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 5), min_size=2, max_size=10), prompt=st.integers(5, 17), batch=st.integers(1, 4),
    padding=st.integers(0, 3), rollback=st.sampled_from([0, 4]), norms=st.booleans(),
    k=st.sampled_from([None, 1, 7, [2, 3, 7]]),
)  # fmt: skip
def test_equals_the_modules(make, chunks, prompt, batch, padding, rollback, norms, k):
    """Prompts and steps of any length, left padding, rings that wrap, norms, and other numbers of experts."""
    model = make()
    arguments = {
        "batch": batch,
        "padding": padding,
        "rollback": rollback,
        "norms": norms,
        "num_experts_per_tok": k,
    }
    same(generate(model, [prompt, *chunks], **arguments), generate(model, [prompt, *chunks], in_c=False, **arguments))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_takes_a_handful_of_rows_and_leaves_the_rest_to_the_modules(make, calls):
    model = make()
    generate(model, [17, 1, 2, 3, 16], rollback=15)
    assert calls.count == CONFIG.num_hidden_layers  # the prompt alone
    for chunks, batch, rollback in (([17, 17], 1, 16), ([17, 9, 1], 2, 8), ([17, 2, 1], 1, 0)):
        calls.count = 0  # 17 rows; 18 rows and then 2; 2 tokens whose own keys would overwrite what they need in a ring
        generate(model, chunks, batch, rollback=rollback)
        assert calls.count == 2 * CONFIG.num_hidden_layers


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_bf16_is_as_near_to_fp32_as_the_modules_are(make):
    """All experts chosen, so that no router near a tie decides between them."""
    model = make()
    for block in model.blocks:
        block.moe.router.num_experts_per_tok = 7
    exact = generate(model, [17, 1, 3, 1, 1])
    model.to(torch.bfloat16)
    errors = []
    for in_c in (True, False):
        found = generate(model, [17, 1, 3, 1, 1], in_c=in_c)
        errors.append(max(float((a.logits - b.logits).norm() / b.logits.norm()) for a, b in zip(found, exact)))
        assert found[0].logits.dtype == torch.bfloat16
    assert errors[0] < 0.03 and errors[0] < 1.3 * errors[1], errors


@pytest.mark.parametrize("kept", [[0, 2, 3, 6], [1, 5]], ids=["4 of 7", "fewer than k"])
def test_masked_experts_are_never_chosen(kept, calls):
    model = packed_model()
    model.blocks[1].moe.router.keep_only(kept)
    found, expected = generate(model, [17, 1, 2]), generate(model, [17, 1, 2], in_c=False)
    same(found, expected)
    assert all(set(out.routing[1].indices.flatten().tolist()) <= set(kept) for out in found)
    assert found[0].routing[1].indices.shape[1] == min(3, len(kept))


def test_a_selection_bias_moves_the_choice_and_not_the_weights(calls):
    model = packed_model()
    model.blocks[2].moe.router.selection_bias = torch.tensor([0.0, 9.0, 0, 0, 0, -9.0, 0])
    found = generate(model, [17, 1, 1])
    assert calls.count == CONFIG.num_hidden_layers
    same(found, generate(model, [17, 1, 1], in_c=False))
    assert all(out.routing[2].indices[0, 0] == 1 for out in found)


def test_equal_scores_go_to_the_lower_id():
    model = packed_model()
    router = model.blocks[0].moe.router
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.tensor([1.0, 2.0, 1.0, 2.0, 2.0, 1.0, 2.0]))
    for out in generate(model, [17, 1, 3], rollback=2):
        assert out.routing[0].indices.tolist() == [[1, 3, 4]] * len(out.routing[0].indices)
        assert torch.allclose(out.routing[0].weights, torch.tensor(1 / 3))


def test_not_a_number_shows_and_crashes_nothing():
    model = packed_model()
    with torch.no_grad():
        model.blocks[0].moe.router.bias[4] = float("nan")
    out = generate(model, [17, 1])[0]
    assert out.routing[0].indices[0, 0] == 4 and not out.logits.isfinite().any()


def unusual(name: str, model: Transformer, monkeypatch):
    """Make the model, or its surroundings, such that the modules must serve; returns what to enter meanwhile."""
    block, around = model.blocks[1], torch.no_grad()
    if name == "hook":
        block.moe.register_forward_hook(lambda *_: None)
    elif name == "replaced forward":
        block.attn.forward = lambda *a, plain=block.attn.forward: plain(*a)
    elif name == "dispatcher":
        block.moe.dispatcher = lambda *a: local_dispatch(*a)
    elif name == "adapter":
        add_adapters(model, LoRAConfig(rank={"attention": 2}), seed=0)
    elif name == "another dtype":
        block.moe_norm.weight.data = block.moe_norm.weight.data.double()
    elif name == "portable":
        around = dispatch.use("portable")
    elif name == "half packed":
        experts = block.moe.experts
        weight = experts.gate_up.decode(dtype=torch.float32)
        del experts.gate_up
        experts.gate_up = torch.nn.Parameter(weight, requires_grad=False)
    elif name == "gradients":
        around = torch.enable_grad()
    elif name == "autocast":
        around = torch.autocast("cpu", torch.bfloat16)
    return around


@pytest.mark.parametrize(
    "name",
    [
        "hook", "replaced forward", "dispatcher", "adapter", "another dtype", "portable", "half packed", "gradients",
        "autocast",
    ],
)  # fmt: skip
def test_what_is_unusual_goes_through_the_modules(name, monkeypatch):
    model = packed_model()
    model.requires_grad_(False)
    around, taken = unusual(name, model, monkeypatch), []
    plain = decode_step.decode_step
    monkeypatch.setattr(decode_step, "decode_step", lambda *a, **k: taken.append(1) or plain(*a, **k))
    with torch.no_grad(), around:
        cache = KVCache(model.config)
        model(torch.arange(17)[None], cache)
        assert model(torch.tensor([[3]]), cache).logits.isfinite().all()
    assert not taken
    usual, cache = packed_model(), KVCache(CONFIG)
    with torch.no_grad():
        usual(torch.tensor([[3]]), cache)
    assert taken  # the watch itself works


def test_a_wrong_number_of_experts_is_refused_by_the_router():
    with pytest.raises(ConfigError, match="num_experts_per_tok is 8"):
        generate(packed_model(), [4, 1], num_experts_per_tok=8)


def test_tokens_can_be_taken_back():
    """Going back and on again gives what a straight way gives, rings included."""
    model, cache = packed_model(), KVCache(CONFIG, rollback=3)
    straight = generate(model, [11, 1, 1, 1])
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, CONFIG.vocab_size, (1, 14), generator=generator)
    with torch.no_grad():
        model(tokens[:, :11], cache)
        model(torch.tensor([[1, 2, 3]]), cache)
        cache.truncate(11)
        again = [model(tokens[:, i : i + 1], cache) for i in range(11, 14)]
    same(again, straight)
