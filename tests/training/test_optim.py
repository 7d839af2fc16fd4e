"""Parameter groups, AdamW and Muon against plain loops, and the shape of the schedules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.errors import CheckpointError, ConfigError
from xmoe.model.config import preset
from xmoe.model.transformer import build
from xmoe.training.optim import Muon, OptimConfig, Optimizer, lr_fraction, newton_schulz, orthogonal_scale, role


def small_model(**changes):
    return build(preset("tiny", num_hidden_layers=2, **changes), seed=3)


def fill_gradients(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_every_parameter_has_the_role_the_table_says():
    roles = {name: role(name, parameter) for name, parameter in small_model().named_parameters()}
    assert {n for n, r in roles.items() if r == "table"} == {"embed.weight", "head.weight"}
    assert {n for n, r in roles.items() if r == "router"} == {
        f"blocks.{i}.moe.router.{w}" for i in (0, 1) for w in ("weight", "bias")
    }
    matrices = ("attn.qkv.weight", "attn.out.weight", "moe.experts.gate_up", "moe.experts.down")
    assert {n for n, r in roles.items() if r == "matrix"} == {f"blocks.{i}.{m}" for i in (0, 1) for m in matrices}
    vectors = {n for n, r in roles.items() if r == "vector"}
    assert {
        "norm.weight",
        "blocks.0.attn.sinks",
        "blocks.1.moe.experts.gate_up_bias",
        "blocks.1.moe.experts.down_bias",
    } < vectors


def test_adamw_equals_a_plain_loop_and_decays_matrices_only():
    config = OptimConfig(name="adamw", lr=0.01, weight_decay=0.3, warmup_steps=2, schedule="cosine", grad_clip=0)
    model = small_model()
    start = {name: p.detach().double() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, config, total_steps=5)
    first = {name: torch.zeros_like(p) for name, p in start.items()}
    second = {name: torch.zeros_like(p) for name, p in start.items()}
    for step in range(5):
        fill_gradients(model, step)
        lr = config.lr * lr_fraction(step, 5, config)
        for name, p in model.named_parameters():
            g = p.grad.double()
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * g
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * g * g
            if role(name, p) == "matrix":
                start[name] = start[name] * (1 - lr * config.weight_decay)
            m = first[name] / (1 - config.beta1 ** (step + 1))
            v = second[name] / (1 - config.beta2 ** (step + 1))
            start[name] = start[name] - lr * m / (v.sqrt() + config.eps)
        optimizer.step(step)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), start[name], rtol=1e-5, atol=1e-6)


def test_muon_equals_a_plain_loop_over_steps_and_experts():
    stack = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = [stack.detach()[e].clone() for e in range(3)]
    momentum = [torch.zeros(8, 5) for _ in range(3)]
    muon = Muon([stack], lr=0.02, momentum=0.9, weight_decay=0.5)
    for step in range(4):
        gradient = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(10 + step))
        stack.grad = gradient.clone()
        muon.step()
        for e in range(3):
            momentum[e] = 0.9 * momentum[e] + gradient[e]
            x = gradient[e] + 0.9 * momentum[e]
            x = x / x.norm()
            for _ in range(5):  # the textbook order X X' on the tall side, in float32
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            plain[e] = plain[e] * (1 - 0.02 * 0.5) - 0.02 * 0.2 * math.sqrt(8) * x
    # bfloat16 keeps three digits of an update of size 0.02 * 0.2 * sqrt(8) * 1
    torch.testing.assert_close(stack.detach(), torch.stack(plain), rtol=0, atol=4 * 0.0113 * 0.02)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(2, 24), st.integers(2, 24), st.integers(0, 10**6))
def test_newton_schulz_makes_every_expert_nearly_orthogonal(experts, rows, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    stack = torch.randn(experts, rows, cols, generator=generator)
    # Experts of very different size must not disturb one another.
    stack *= 10.0 ** torch.randint(-4, 4, (experts, 1, 1), generator=generator)
    out = newton_schulz(stack).float()
    assert out.shape == stack.shape
    u, s, v = torch.linalg.svd(stack, full_matrices=False)
    big = s > 0.1 * s[:, :1]  # five steps lift singular values above a tenth or so of the largest
    found = (u.mT @ out @ v.mT).diagonal(dim1=-2, dim2=-1)
    assert (found[big] > 0.5).all() and (found[big] < 1.35).all()


def test_newton_schulz_of_a_dense_matrix_equals_the_stack_of_one():
    matrix = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(newton_schulz(matrix), newton_schulz(matrix[None])[0])


def test_an_expert_without_gradient_and_momentum_only_decays():
    stack = torch.ones(2, 4, 3).requires_grad_()
    stack.grad = torch.zeros(2, 4, 3)
    stack.grad[1] = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    Muon([stack], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(stack[0], torch.full((4, 3), 0.95))
    assert not torch.allclose(stack[1], stack[0])


def test_muons_update_has_the_size_of_adamws():
    matrix = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    update = orthogonal_scale(64, 96) * newton_schulz(matrix).float()
    # Square or not, the root mean square is near 0.2: 64 unit directions over 64 * 96 entries, times the scale.
    assert 0.12 < update.square().mean().sqrt() < 0.28


def test_muon_takes_matrices_and_adamw_the_rest():
    model = small_model()
    optimizer = Optimizer(model, OptimConfig(), total_steps=3)
    taken = {id(p) for group in optimizer.parts["muon"].param_groups for p in group["params"]}
    assert taken == {id(p) for name, p in model.named_parameters() if role(name, p) == "matrix"}
    rest = [p for group in optimizer.parts["adamw"].param_groups for p in group["params"]]
    assert len(rest) + len(taken) == len(list(model.parameters()))
    assert all(group["weight_decay"] == 0 for group in optimizer.parts["adamw"].param_groups)


def test_frozen_parameters_are_left_out():
    model = small_model()
    for parameter in model.embed.parameters():
        parameter.requires_grad_(False)
    names = Optimizer(model, OptimConfig(), total_steps=3).names
    assert names["table"] == ["head.weight"]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        Optimizer(model, OptimConfig(), total_steps=3)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_saved_optimizer_goes_on_bit_for_bit(name):
    config = OptimConfig(name=name, lr=0.01, warmup_steps=1)
    whole, first = small_model(), small_model()
    one, two = Optimizer(whole, config, 6), Optimizer(first, config, 6)
    for step in range(6):
        fill_gradients(whole, step)
        one.step(step)
        if step == 3:
            state = two.state_dict()
            second = small_model()
            second.load_state_dict(first.state_dict())
            first, two = second, Optimizer(second, config, 6)
            two.load_state_dict(state)
        fill_gradients(first, step)
        two.step(step)
    for (n, a), b in zip(whole.named_parameters(), first.parameters()):
        assert torch.equal(a, b), n


def test_the_state_of_another_optimizer_is_refused():
    muon = Optimizer(small_model(), OptimConfig(), 3)
    with pytest.raises(CheckpointError, match=r"adamw\+muon, this run's is adamw"):
        Optimizer(small_model(), OptimConfig(name="adamw"), 3).load_state_dict(muon.state_dict())
    with pytest.raises(CheckpointError, match="other parameters"):
        Optimizer(small_model(tie_word_embeddings=True), OptimConfig(), 3).load_state_dict(muon.state_dict())


def test_clipping_scales_all_gradients_by_one_factor():
    model = small_model()
    optimizer = Optimizer(model, OptimConfig(grad_clip=0.5), 3)
    fill_gradients(model, 0)
    before = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.clip(before.norm())
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(after, before * 0.5 / before.norm(), rtol=1e-4, atol=1e-7)


def test_wsd_is_a_trapezoid():
    config = OptimConfig(schedule="wsd", warmup_steps=10, decay_fraction=0.4, min_lr_fraction=0.1)
    rates = [lr_fraction(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0
    assert all(rate == 1.0 for rate in rates[9:60])
    assert rates[79] == pytest.approx(0.1 + 0.9 * 20 / 40) and rates[99] == pytest.approx(0.1)
    falls = [a - b for a, b in itertools.pairwise(rates[60:])]
    assert max(falls) - min(falls) < 1e-12


def test_cosine_falls_along_half_a_wave():
    config = OptimConfig(schedule="cosine", warmup_steps=4, min_lr_fraction=0.1)
    rates = [lr_fraction(step, 105, config) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[54] == pytest.approx(0.55) and rates[104] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


@settings(deadline=None)
@given(
    st.sampled_from(["wsd", "cosine"]),
    st.integers(1, 300),
    st.integers(0, 400),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 500),
)
def test_the_rate_stays_between_nothing_and_the_peak(schedule, total, warmup, decay, floor, step):
    config = OptimConfig(schedule=schedule, warmup_steps=warmup, decay_fraction=decay, min_lr_fraction=floor)
    assert 0 <= lr_fraction(step, total, config) <= 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", float("nan")),
        ("muon_lr", -1.0),
        ("beta2", 1.0),
        ("decay_fraction", 1.5),
        ("grad_clip", -1.0),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"optim.{field} is"):
        OptimConfig(**{field: value})
