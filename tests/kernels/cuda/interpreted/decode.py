"""The decode step, kernel by kernel, against the model's own forward pass; and the backend's doors."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error

from xmoe.errors import ConfigError
from xmoe.kernels import dispatch, reference
from xmoe.kernels.adapter import Adapter
from xmoe.kernels.cuda import backend as triton_backend
from xmoe.kernels.cuda import tiles
from xmoe.kernels.cuda.decode_step import DecodeStep
from xmoe.kernels.cuda.repack import RepackedWeight
from xmoe.model.config import ModelConfig
from xmoe.model.rope import concentration, inverse_frequencies, rope_tables
from xmoe.model.transformer import build
from xmoe.quantization.packed import PackedWeight

PACKED = {"BM": 16, "BN": 64, "KB": 1, "SPLIT": 2, "warps": 4, "stages": 2}
DENSE = {"BM": 16, "BN": 32, "BK": 32, "GROUP": 2, "warps": 4, "stages": 2}
TILES = dict.fromkeys(("mxfp4_gate_up", "mxfp4_down", "mxfp4_linear"), PACKED)
TILES |= dict.fromkeys(("grouped_rows", "grouped_gate_up", "grouped_weight"), DENSE)
TILES["mxfp4_input_gradient"] = {"BM": 16, "BN": 64, "warps": 4, "stages": 2}
TILES["decode_attention"] = {"SPLITS": 2, "BT": 16, "warps": 4, "stages": 1}


def model(packed: bool):
    config = ModelConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=32,
        num_experts=5,
        num_experts_per_tok=2,
        sliding_window=6,
        rope_scaling_factor=4.0,
        initial_context_length=16,
        initializer_range=0.3,
    )
    made = build(config, seed=3).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_(generator=torch.Generator().manual_seed(5))
    if packed:
        for block in made.blocks:
            for name in ("gate_up", "down"):
                weight = getattr(block.moe.experts, name)
                block.moe.experts.pack(name, PackedWeight.encode(weight.detach(), "mxfp4"))
    return made


def tables(made, length):
    positions = torch.arange(length).unsqueeze(0)
    cos, sin = rope_tables(positions, inverse_frequencies(made.config), concentration(made.config))
    return cos[0].contiguous(), sin[0].contiguous()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("prompt", [3, 9])
def test_steps_equal_the_full_forward_pass(packed, prompt):
    """Through the window's edge (6): the ring wraps, and a prompt may already be longer than it."""
    made = model(packed)
    if packed:
        assert triton_backend.prepare(made) == 4 and triton_backend.prepare(made) == 0
        assert isinstance(made.blocks[0].moe.experts.down, RepackedWeight)
    tokens = torch.randint(0, 50, (2, prompt), generator=torch.Generator().manual_seed(prompt))
    with tiles.override(TILES):
        step = DecodeStep(made, 2, prompt + 4, tables(made, prompt + 4))
        with dispatch.use("reference"), torch.no_grad():
            logits = [step.prefill(tokens)]
        chosen = [step.tokens.clone()]
        for _ in range(4):
            logits.append(step.step().clone())
            chosen.append(step.tokens.clone())
        assert step.positions.tolist() == [prompt + 4] * 2
        with pytest.raises(ConfigError, match="max_length"):
            step.step()
    whole = torch.cat((tokens, torch.stack(chosen[:-1], 1)), 1)
    with dispatch.use("reference"), torch.no_grad():
        expected = made(whole).logits[:, prompt - 1 :]
    assert relative_error(torch.stack(logits, 1), expected) < 1e-5
    assert torch.equal(torch.stack(chosen, 1), expected.argmax(-1))


def test_a_router_that_keeps_few_experts_is_obeyed():
    made = model(False)
    made.blocks[1].moe.router.keep_only([1, 4])
    tokens = torch.tensor([[7, 9, 2]])
    with tiles.override(TILES):
        step = DecodeStep(made, 1, 5, tables(made, 5), greedy=False)
        with dispatch.use("reference"):
            step.prefill(tokens)
        step.tokens.copy_(torch.tensor([11]))
        logits = step.step()
    with dispatch.use("reference"), torch.no_grad():
        expected = made(torch.tensor([[7, 9, 2, 11]])).logits[:, -1]
    assert relative_error(logits, expected) < 1e-5 and step.tokens.tolist() == [11]


def test_mistakes_are_named():
    made = model(False)
    with pytest.raises(ConfigError, match="rotary tables have 4 rows"):
        DecodeStep(made, 1, 5, tables(made, 4))
    step = DecodeStep(made, 1, 5, tables(made, 5))
    assert step.cache_bytes == 2 * 2 * 5 * 2 * 16 * 4
    with pytest.raises(ConfigError, match="prompts have 5 tokens"):
        step.prefill(torch.zeros(1, 5, dtype=torch.int64))
    made.blocks[0].moe.router.selection_bias = torch.zeros(5)
    with pytest.raises(ConfigError, match="selection bias"):
        DecodeStep(made, 1, 5, tables(made, 5))


def test_repacked_weights_answer_as_the_checkpoint_does():
    plain, prepared = model(True), model(True)
    triton_backend.prepare(prepared)
    state, after = plain.state_dict(), prepared.state_dict()
    assert sorted(state) == sorted(after)
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    mine, theirs = (m.blocks[0].moe.experts.gate_up for m in (prepared, plain))
    assert torch.equal(mine.decode([3, 1], torch.float32), theirs.decode([3, 1], torch.float32))
    assert torch.equal(mine.decode(), theirs.decode())
    few = mine.select_experts([4, 0])
    assert torch.equal(few.blocks, theirs.select_experts([4, 0]).blocks) and few.shape == (2, 64, 64)
    assert mine.device.type == "cpu" and mine.nbytes >= theirs.nbytes
    state = {name: tensor.roll(1, 0) if ".down." in name else tensor for name, tensor in state.items()}
    prepared.load_state_dict(state)
    assert torch.equal(
        prepared.state_dict()["blocks.1.moe.experts.down.blocks"], state["blocks.1.moe.experts.down.blocks"]
    )
    with pytest.raises(RuntimeError, match=r"down\.blocks"):
        prepared.load_state_dict({k: v for k, v in state.items() if not k.endswith("down.blocks")})


@pytest.mark.parametrize("packed", [True, False])
def test_backend_experts(packed):
    stack = model(packed).blocks[0].moe.experts
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 64, generator=generator).requires_grad_()
    indices = torch.randint(0, 5, (7, 2), generator=generator)
    weights = torch.rand(7, 2, generator=generator).requires_grad_()
    given = indices, weights, stack.gate_up, stack.gate_up_bias, stack.down, stack.down_bias
    with tiles.override(TILES):
        y, norms = triton_backend.experts(x, *given, norms=True)
        with torch.no_grad():
            strided = [
                t.detach().t().contiguous().t() for t in (x, indices, weights)
            ]  # the same numbers, other strides
            again, none = triton_backend.experts(*strided, *given[2:])
    expected, expected_norms = reference.experts(x, *given, norms=True)
    assert relative_error(y, expected) < 3e-6 and relative_error(norms, expected_norms) < 3e-6
    assert torch.equal(again, y) and none is None
    for mine, truth in zip(*(torch.autograd.grad(out.sum(), (x, weights)) for out in (y, expected))):
        assert relative_error(mine, truth) < 3e-6


@pytest.mark.parametrize("packed", [True, False])
def test_backend_expert_linear(packed):
    stack = model(packed).blocks[0].moe.experts
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    indices = torch.randint(0, 5, (7, 2), generator=torch.Generator().manual_seed(2))
    indices[2, 1], indices[5] = -1, -1
    bias = stack.gate_up_bias.detach()
    with tiles.override(TILES):
        out = triton_backend.expert_linear(x, indices, stack.gate_up, bias)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        (got,) = torch.autograd.grad(out, x, dout)
    dense = stack.gate_up.decode(dtype=torch.float32) if packed else stack.gate_up
    expected = torch.einsum("td,tknd->tkn", x, dense[indices.clamp(min=0)]) + bias[indices.clamp(min=0)]
    expected = expected.masked_fill((indices < 0).unsqueeze(-1), 0.0)
    assert relative_error(out, expected) < 3e-6
    assert relative_error(got, torch.autograd.grad(expected, x, dout)[0]) < 3e-6


@pytest.mark.parametrize("which", [("gate_up", "down"), ("down",)])
@pytest.mark.parametrize("packed", [True, False])
def test_backend_experts_with_adapters(packed, which):
    """Beside frozen weights, packed or dense: values, and gradients of x, the routing weights and the adapters."""
    stack = model(packed).blocks[0].moe.experts.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 64, generator=generator).requires_grad_()
    indices = torch.randint(0, 4, (7, 2), generator=generator)  # the last expert has no rows
    indices[2, 1], indices[5] = -1, -1
    weights = torch.rand(7, 2, generator=generator).requires_grad_()
    given = indices, weights, stack.gate_up, stack.gate_up_bias, stack.down, stack.down_bias
    low, leaves = {}, [x, weights]
    for name, rank in (("gate_up", 5), ("down", 3)):
        if name in which:
            E, out, width = getattr(stack, name).shape
            a, b = (
                torch.randn(E, *s, generator=generator).div(8).requires_grad_() for s in ((rank, width), (out, rank))
            )
            low[f"{name}_adapter"] = Adapter(a, b, 0.7)
            leaves += [a, b]
    dy = torch.randn(7, 64, generator=generator)
    with tiles.override(TILES):
        y, norms = triton_backend.experts(x, *given, norms=True, **low)
        got = torch.autograd.grad(y, leaves, dy)
    expected, expected_norms = reference.experts(x, *given, norms=True, **low)
    assert relative_error(y, expected) < 3e-6 and relative_error(norms, expected_norms) < 3e-6
    for mine, truth in zip(got, torch.autograd.grad(expected, leaves, dy)):
        assert bool(truth.any()) and relative_error(mine, truth) < 3e-6


@pytest.mark.parametrize("S, L", [(2, 9), (9, 9)])
def test_backend_attention_norm_and_rope(S, L):
    generator = torch.Generator().manual_seed(S)
    q, k, v = (torch.randn(1, n, h, 16, generator=generator) for n, h in ((S, 4), (L, 2), (L, 2)))
    sinks = torch.randn(4, generator=generator)
    q_pos, k_pos = torch.arange(L - S, L).unsqueeze(0), torch.arange(L).unsqueeze(0)
    tile = {name: {**TILES["decode_attention"], "BQ": 16} for name in ("decode_attention", "flash_forward")}
    tile["decode_attention"], tile["flash_forward"] = (
        TILES["decode_attention"],
        {"BQ": 16, "BT": 16, "warps": 4, "stages": 1},
    )
    with tiles.override(tile):
        for gradients in (False, True):
            out = triton_backend.attention(q.requires_grad_(gradients), k, v, sinks, window=5, q_pos=q_pos, k_pos=k_pos)
            expected = reference.attention(q, k, v, sinks, window=5, q_pos=q_pos, k_pos=k_pos)
            assert relative_error(out, expected) < 3e-6 and out.requires_grad == gradients
    weight = torch.randn(16, generator=generator)
    assert relative_error(triton_backend.rms_norm(k, weight, 1e-5), reference.rms_norm(k, weight, 1e-5)) < 1e-6
    angle = torch.randn(1, L, 8, generator=generator)
    assert (
        relative_error(triton_backend.rope(k, angle.cos(), angle.sin()), reference.rope(k, angle.cos(), angle.sin()))
        < 1e-6
    )
