"""Low-rank experts: errors against the spectrum in float64, bytes against files, factors against their product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.weights import convert, load, save
from xmoe.compression.apply import mask, prune
from xmoe.compression.changed import save_changed
from xmoe.compression.cut import prune_checkpoint
from xmoe.compression.expert_inputs import LayerInputs, mixed
from xmoe.compression.low_rank import rank_for
from xmoe.compression.manifest import read
from xmoe.compression.merge import merge
from xmoe.compression.plan import plan_pruning
from xmoe.compression.reconstruction import expert_output
from xmoe.compression.reduce import reduce
from xmoe.compression.routing import record_routing
from xmoe.compression.verify import verify
from xmoe.errors import CheckpointError, ConfigError, DataError
from xmoe.model.describe import describe
from xmoe.quantization.packed import PackedWeight, dense_matrix

WEIGHTS = ("gate_up", "down")


@pytest.fixture
def text():
    """int64 [16, 40]: enough for most experts to get more tokens than they have inputs."""
    return torch.randint(0, 70, (16, 40), generator=torch.Generator().manual_seed(8))


@pytest.fixture
def uneven(model):
    """The random model; the experts' inputs are far from even, as a trained model's are."""
    with torch.no_grad():
        for block in model.blocks:
            order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
            block.moe_norm.weight.copy_(torch.logspace(0.3, -1.7, 32)[order])
    return model


def multiplied_out(model):
    """The same model with dense experts that hold the products of the factors."""
    import copy

    dense = copy.deepcopy(model)
    for block in dense.blocks:
        for name in WEIGHTS:
            weight = getattr(block.moe.experts, name)
            delattr(block.moe.experts, name)
            product = torch.bmm(weight.left.double(), weight.right.double()).float()
            setattr(block.moe.experts, name, torch.nn.Parameter(product))
    return dense


@torch.no_grad()
def test_plain_errors_are_the_discarded_spectrum(model):
    small, (stage,) = reduce(model, ["low-rank"], 0.5)
    for old, new in zip(model.blocks, small.blocks):
        a, b = old.moe.experts, new.moe.experts
        assert (b.gate_up.left.shape[2], b.down.left.shape[2]) == (12, 10)  # 4096 / 2 / 160 and 2048 / 2 / 96
        for name in WEIGHTS:
            for e in range(7):
                was, now = dense_matrix(getattr(a, name), e).double(), getattr(b, name)
                singular = torch.linalg.svdvals(was)
                lost = float(singular[now.left.shape[2] :].square().sum().sqrt())
                error = float((was - now.left[e].double() @ now.right[e].double()).norm())
                assert error == pytest.approx(lost, rel=1e-4)
        assert torch.equal(a.gate_up_bias, b.gate_up_bias) and torch.equal(a.down_bias, b.down_bias)
    assert stage.detail == "rank 12 (gate_up) and 10 (down), plain"
    assert stage.weights_after == 3 * 7 * (12 * 160 + 10 * 96) and stage.bytes_after == 4 * stage.weights_after
    assert all(isinstance(getattr(b.moe.experts, n), torch.nn.Parameter) for b in model.blocks for n in WEIGHTS)


@torch.no_grad()
def test_fitted_factors_beat_plain_ones_on_every_expert_with_enough_tokens(uneven, text):
    """In the error they are made for, and in what the expert says; on the text they were fitted to."""
    plain, _ = reduce(uneven, ["low-rank"], 0.5)
    fitted, (stage,) = reduce(uneven, ["low-rank"], 0.5, batches=[text], whiten=True)
    assert stage.detail.startswith("rank 12 (gate_up) and 10 (down), fitted to 640 tokens")
    sample, enough = record_routing(uneven, [text], sample=640).sample, 0
    for layer, block in enumerate(uneven.blocks):
        fed = LayerInputs(block.moe, sample[layer])
        for e in range(7):
            x, g = fed.of(e)
            if len(x) < 64:
                continue
            enough += 1
            hidden, wanted = expert_output(block.moe.experts, e, x)
            errors = {}
            for kind, model in (("plain", plain), ("fitted", fitted)):
                experts = model.blocks[layer].moe.experts
                parts = [(inputs, dense_matrix(getattr(block.moe.experts, n), e) - dense_matrix(getattr(experts, n), e))
                         for n, inputs in (("gate_up", x), ("down", hidden))]  # fmt: skip
                parts = [float((g.unsqueeze(1) * (inputs @ d.T)).norm()) for inputs, d in parts]
                said = expert_output(experts, e, x)[1]
                errors[kind] = (*parts, float((g.unsqueeze(1) * (said - wanted)).norm()))
            assert all(a < b for a, b in zip(errors["fitted"], errors["plain"])), (layer, e, errors)
    assert enough >= 12 and f"too few for {21 - enough} of 21" in stage.detail


def test_the_gathered_text_and_a_sample_of_all_of_it_are_one(uneven, text):
    stats = record_routing(uneven, [text], sample=640)
    by_sample, _ = reduce(uneven, ["low-rank"], 0.4, stats=stats, whiten=True)
    padded = torch.cat((text, torch.zeros(16, 3, dtype=torch.int64)), dim=1)
    real = torch.arange(43).expand(16, 43) < 40
    halves = [(padded[:5], real[:5]), (padded[5:], real[5:])]
    by_text, _ = reduce(uneven, ["low-rank"], 0.4, stats=stats, batches=halves, whiten=True)
    for a, b in zip(by_sample.blocks, by_text.blocks):
        for name in WEIGHTS:
            pair = [getattr(block.moe.experts, name).decode(dtype=torch.float32) for block in (a, b)]
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)


def test_experts_with_few_tokens_lean_on_the_layers_and_none_is_plain(model, tokens):
    """66 tokens, three of seven experts each: fewer than the 64 inputs of down, more or less than the 32 of gate_up."""
    small, (stage,) = reduce(model, ["low-rank"], 0.5, batches=[tokens], whiten=True)
    assert "too few for 21 of 21 experts" in stage.detail
    assert all(bool(p.isfinite().all()) for p in small.state_dict().values())
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(mixed(torch.zeros_like(eye), 0, lambda: torch.zeros_like(eye), 0), eye)
    own, all_of_them = torch.diag(torch.arange(1.0, 6)).double(), 2 * eye
    torch.testing.assert_close(mixed(own, 4, lambda: all_of_them, 9), 0.8 * own + 0.2 * all_of_them)
    torch.testing.assert_close(mixed(own, 5, lambda: 1 / 0, 9), own)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 100))
def test_mixed_moments_are_positive_definite(count, rest, seed):
    rows = torch.randn(count + rest, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    own, pooled = (r.T @ r / max(len(r), 1) for r in (rows[:count], rows))
    torch.linalg.cholesky(mixed(own, count, lambda: pooled, count + rest))


@torch.no_grad()
def test_stored_factors_run_as_their_product_and_come_back_bit_for_bit(uneven, text, tmp_path):
    small, (stage,) = reduce(uneven, ["low-rank"], 0.5, batches=[text], whiten=True)
    torch.testing.assert_close(small(text).logits, multiplied_out(small)(text).logits, rtol=1e-5, atol=1e-5)
    save(uneven, tmp_path / "source")
    save_changed(small, tmp_path / "source", tmp_path / "out", [{"name": "reduce", **stage._asdict()}])
    opened = Checkpoint(tmp_path / "out")
    assert opened.formats == ["low-rank"] and opened.ranks("blocks.1.moe.experts.down") == [10]
    stored = [i.nbytes for n, i in opened.reader.tensors.items() if n.endswith((".left", ".right"))]
    assert len(stored) == 12 and sum(stored) == stage.bytes_after
    back, _ = load(tmp_path / "out")
    for (name, a), (other, b) in zip(sorted(small.state_dict().items()), sorted(back.state_dict().items())):
        assert name == other and torch.equal(a, b)
    assert torch.equal(back(text).logits, small(text).logits)
    spared = stage.weights_before - stage.weights_after
    manifest = read(tmp_path / "out")
    assert manifest["after"]["parameters"] == uneven.config.parameter_count() - spared == opened.parameter_counts[0]
    assert manifest["after"]["active_parameters"] == uneven.config.active_parameter_count() - spared * 3 // 7
    assert manifest["after"]["bytes"] == 4 * manifest["after"]["parameters"]
    assert describe(back).expert_format == "low-rank" and describe(back).parameters == opened.parameter_counts[0]
    half, _ = load(tmp_path / "out", dtype="bfloat16")
    assert half.blocks[0].moe.experts.down.left.dtype == torch.bfloat16
    dense, _ = load(tmp_path / "out", experts="dense")
    torch.testing.assert_close(dense(text).logits, small(text).logits, rtol=1e-5, atol=1e-5)
    convert(tmp_path / "out", tmp_path / "expanded", "hf-bf16")
    assert Checkpoint(tmp_path / "expanded").formats == ["dense"]


def test_gradients_flow_through_factors(model, tokens):
    small, _ = reduce(model, ["low-rank"], 0.5)
    dense = multiplied_out(small)
    for m in (small, dense):
        m(tokens).logits.square().mean().backward()
    for name, p in small.named_parameters():
        torch.testing.assert_close(p.grad, dense.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_a_plan_works_on_factors_and_a_cut_is_proved(model, tokens, tmp_path):
    small, _ = reduce(model, ["low-rank"], 0.5)
    small = small.to(torch.bfloat16)
    plan = plan_pruning(record_routing(small, [tokens]), "reap_sum", 4)
    with mask(small, plan):
        masked = small(tokens).logits
    save(small, tmp_path / "source")
    prune_checkpoint(tmp_path / "source", plan, tmp_path / "cut")
    cut, _ = load(tmp_path / "cut")
    assert torch.equal(cut(tokens).logits, prune(small, plan)(tokens).logits)
    assert torch.equal(cut(tokens).logits, masked)
    assert verify(tmp_path / "source", tmp_path / "cut").ok
    after = read(tmp_path / "cut")["after"]
    assert (
        after["parameters"] == Checkpoint(tmp_path / "cut").parameter_counts[0]
        and after["bytes"] == 2 * after["parameters"]
    )


def test_mxfp4_is_judged_by_its_bytes(random_model, config, pack):
    """4.25 bits a weight against factors in bfloat16: at [128, 64] the most is rank 11, not 42."""
    model = pack(random_model(config(hidden_size=64)))
    weight = model.blocks[0].moe.experts.gate_up
    assert weight.nbytes == 7 * 128 * 64 * 17 // 32
    assert [rank_for(weight, f) for f in (0.0, 0.25, 0.5, 0.9)] == [11, 8, 5, 1]
    small, (stage,) = reduce(model, ["low-rank"], 0.25)
    assert small.blocks[0].moe.experts.gate_up.left.dtype == torch.bfloat16
    assert 0.7 < stage.bytes_after / stage.bytes_before <= 0.75 and "LARGER" not in stage.line()
    assert reduce(model, ["low-rank"], rank=(11, 8))[1][0].bytes_after < stage.bytes_before
    with pytest.raises(ConfigError, match="4,608 bytes an expert in bfloat16 factors, 4,352 in mxfp4; take at most 11"):
        reduce(model, ["low-rank"], rank=(12, 8))


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 60), st.integers(2, 60), st.floats(0.01, 0.99))
def test_a_rank_removes_at_least_the_fraction_and_the_next_would_not(out, width, fraction):
    weight = torch.zeros(3, out, width)
    rank = rank_for(weight, fraction)
    size = 3 * 4 * (out + width)
    assert rank * size <= (1 - fraction) * weight.nbytes * (1 + 1e-9) + 1e-6
    assert (rank + 1) * size > (1 - fraction) * weight.nbytes * (1 - 1e-9) or rank == min(out, width)


def test_whole_layers_alone(model, tokens):
    chosen = [(1, e) for e in range(7)]
    small, (stage,) = reduce(model, ["low-rank"], 0.5, experts=chosen)
    forms = [isinstance(block.moe.experts.down, PackedWeight) for block in small.blocks]
    assert forms == [False, True, False] and describe(small).expert_format == "float32 and low-rank"
    assert torch.equal(small.blocks[0].moe.experts.gate_up, model.blocks[0].moe.experts.gate_up)
    assert stage.weight_error[0] == stage.weight_error[2] == 0 < stage.weight_error[1]
    quantized, _ = reduce(small, ["int8"], experts=[(0, e) for e in range(7)])
    assert describe(quantized).expert_format == "int8 and low-rank and float32"


def test_after_neurons_and_again(model, text):
    small, stages = reduce(model, ["neurons", "low-rank"], 0.25, batches=[text], whiten=True)
    assert [s.method for s in stages] == ["neurons", "low-rank"]
    assert stages[0].bytes_after == stages[1].bytes_before and stages[0].weight_error is None
    assert small.config.intermediate_size == 48 and len(stages[1].output_error) == 3
    _, (stage,) = reduce(small, ["low-rank"], 0.5)
    assert stage.bytes_after <= stage.bytes_before / 2
    best, _ = reduce(model, ["low-rank"], rank=(3, 3))
    twice, _ = reduce(reduce(model, ["low-rank"], rank=(9, 9))[0], ["low-rank"], rank=(3, 3))
    for a, b in zip(best.blocks, twice.blocks):  # the best of the best is the best
        pair = [block.moe.experts.down.decode(dtype=torch.float32) for block in (a, b)]
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-5)


def test_mistakes_are_one_clear_line(model, tokens, random_model, config, tmp_path):
    def refused(message, *args, of=model, **options):
        with pytest.raises((ConfigError, DataError), match=message) as raised:
            reduce(of, *args, **options)
        assert "\n" not in str(raised.value)

    for fraction in (None, 0.0, 1.0, 1.5):
        refused("low-rank needs a fraction between 0 and 1", ["low-rank"], fraction)
    refused(r"gate_up of layer 0 \[128, 32\] in float32: .* less than rank 1 .*at most 0.961", ["low-rank"], 0.98)
    refused(
        r"rank 26 of gate_up of layer 0 \[128, 32\] saves nothing: 16,640 .* 16,384 .* at most 25",
        ["low-rank"],
        rank=(26, 9),
    )
    refused(r"rank 22 of down of layer 0 \[32, 64\] saves nothing", ["low-rank"], rank=(25, 22))
    refused("--whiten looks at what experts are fed; give --data, or --stats", ["low-rank"], 0.5, whiten=True)
    refused("--whiten looks", ["low-rank"], 0.5, whiten=True, stats=record_routing(model, [tokens]))
    other = record_routing(random_model(config(), 3), [tokens], sample=8)
    refused("statistics are of model", ["low-rank"], 0.5, whiten=True, stats=other)
    small, _ = reduce(model, ["low-rank"], 0.5)
    with pytest.raises(ConfigError, match="merge before low-rank"):
        merge(small, record_routing(small, [tokens], sample=9), "ream", 3)
    save(small, tmp_path / "out")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for change in ({"left": None}, {"right": None}, {"left": torch.zeros(7, 128, 11)}):
        damaged = {
            n: change.get(n.rpartition(".")[2], t) if "0.moe.experts.gate_up" in n else t for n, t in tensors.items()
        }
        save_file({n: t for n, t in damaged.items() if t is not None}, tmp_path / "out" / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"gate_up\.(left|right)"):
            Checkpoint(tmp_path / "out")
