"""Methods that touch some experts of a layer: the others keep their bytes, and all that takes a model takes such a one."""

from __future__ import annotations

import pytest
import torch

from xmoe.checkpoint import adapters as adapter_files
from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.shard_reader import ShardReader
from xmoe.checkpoint.weights import convert, load, save
from xmoe.compression.apply import mask, prune
from xmoe.compression.changed import save_changed
from xmoe.compression.cut import prune_checkpoint
from xmoe.compression.manifest import read
from xmoe.compression.merge import merge
from xmoe.compression.plan import PrunePlan, plan_pruning
from xmoe.compression.reduce import reduce
from xmoe.compression.routing import record_checkpoint, record_routing
from xmoe.compression.sweep import pruned_bytes
from xmoe.compression.verify import verify
from xmoe.errors import CheckpointError, ConfigError
from xmoe.kernels import dispatch
from xmoe.kernels.cpu import backend as cpu
from xmoe.model.adapter import Settings
from xmoe.model.describe import describe
from xmoe.quantization.compound import MixedWeight
from xmoe.quantization.packed import dense_matrix
from xmoe.training.adapters import LoRAConfig, add_adapters

WEIGHTS = ("gate_up", "down")
SOME = [(0, 1), (2, 3), (2, 5)]


@pytest.fixture
def mixed(model):
    """Five forms in layer 0 of the random model, two in layer 2; layer 1 is dense."""
    model, _ = reduce(model, ["int8"], experts=[(0, 1), (0, 4), (2, 6)])
    model, _ = reduce(model, ["mxfp4"], experts=[(0, 2)])
    model, _ = reduce(model, ["low-rank"], 0.4, experts=[(0, 0), (0, 5)])
    model, stages = reduce(model, ["low-rank", "int4"], 0.4, experts=[(0, 6)])
    model.expected_bytes = stages[-1].bytes_after
    return model


def decoded(model):
    """The same model, every expert dense in fp32."""
    import copy

    dense = copy.deepcopy(model)
    for block in dense.blocks:
        for name in WEIGHTS:
            weight = getattr(block.moe.experts, name)
            whole = torch.stack([dense_matrix(weight, e) for e in range(weight.shape[0])]).detach()
            block.moe.experts.hold(name, whole)
    return dense


@pytest.mark.parametrize("method", ["magnitude", "low-rank", "int8", "int4", "mxfp4"])
@torch.no_grad()
def test_the_named_experts_change_and_the_others_keep_their_bytes(model, tokens, tmp_path, check_file, method):
    small, (stage,) = reduce(model, [method], 0.4, experts=SOME, stats=record_routing(model, [tokens], sample=40))
    whole, _ = reduce(model, [method], 0.4)
    for i, (old, new, all_of_them) in enumerate(zip(model.blocks, small.blocks, whole.blocks)):
        for name in WEIGHTS:
            weights = [getattr(block.moe.experts, name) for block in (old, new, all_of_them)]
            assert isinstance(weights[1], MixedWeight) == (method != "magnitude" and i != 1)
            for e in range(7):
                was, now, there = (dense_matrix(w, e) for w in weights)
                assert torch.equal(now, there if (i, e) in SOME else was)
    assert stage.weight_error[1] == 0 < min(stage.weight_error[0], stage.weight_error[2])
    assert all((e > 0) == (i != 1) for i, e in enumerate(stage.output_error)) or method == "low-rank"
    opened = check_file(small, stage.bytes_after, tmp_path / "out", tokens)
    format = {"magnitude": []}.get(method, [method])
    assert opened.formats == ["dense", *format]
    assert describe(small).expert_format == " and ".join(["float32", *format])


@torch.no_grad()
def test_five_forms_in_a_layer(mixed, model, tokens, tmp_path, check_file):
    gate_up = mixed.blocks[0].moe.experts.gate_up
    forms = {k: w.format if hasattr(w, "format") else "dense" for k, w in gate_up.parts.items()}
    assert forms == {0: "low-rank", 1: "int8", 2: "mxfp4", 3: "dense", 4: "low-rank-int4"}
    assert gate_up.part.tolist() == [0, 1, 2, 3, 1, 0, 4]
    opened = check_file(mixed, mixed.expected_bytes, tmp_path / "out", tokens)
    assert sorted(opened.formats) == ["dense", "int8", "low-rank", "low-rank-int4", "mxfp4"]
    assert opened.ranks("blocks.0.moe.experts.down") == [12, 32]
    spared = [0] * 7
    for e, ranks in ((0, (15, 12)), (5, (15, 12)), (6, (32, 32))):
        spared[e] = 128 * 32 - ranks[0] * 160 + 32 * 64 - ranks[1] * 96
    assert opened.spared == [spared, [0] * 7, [0] * 7]
    total = model.config.parameter_count() - sum(spared)
    active = model.config.active_parameter_count() - 3 * sum(spared) // 7
    assert opened.parameter_counts == (total, active) == describe(mixed)[:2]
    expected = decoded(mixed)
    torch.testing.assert_close(mixed(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-5)
    for options in ({"experts": "dense"}, {"huge_pages": True}):
        back, _ = load(tmp_path / "out", **options)
        torch.testing.assert_close(back(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-5)
    half, _ = load(tmp_path / "out", dtype="bfloat16")
    held = half.blocks[0].moe.experts.gate_up.tensors
    assert {n for n, t in held.items() if t.dtype == torch.float32} == set() and held["3"].dtype == torch.bfloat16
    difference = half(tokens).logits.float() - expected(tokens).logits
    assert difference.norm() < 0.1 * expected(tokens).logits.norm()


@pytest.mark.parametrize("backend", ["reference", "portable", "cpu"])
def test_every_backend_takes_the_parts(mixed, tokens, backend):
    """Values, output lengths and gradients of a layer against the reference on the decoded stack."""
    if backend == "cpu" and not cpu.available():
        pytest.skip(cpu.reason())
    g = torch.Generator().manual_seed(1)
    x, weights = torch.randn(23, 32, generator=g), torch.rand(23, 3, generator=g)
    indices = torch.randint(-1, 7, (23, 3), generator=g)
    found = []
    for model, name in ((mixed, backend), (decoded(mixed), "reference")):
        experts = model.blocks[0].moe.experts
        given = x.clone().requires_grad_(), weights.clone().requires_grad_()
        with dispatch.use(name):
            y, norms = experts(given[0], indices, given[1], norms=True)
            y.square().sum().backward()
        biases = [experts.gate_up_bias.grad, experts.down_bias.grad]
        found.append([y.detach(), norms, *(t.grad for t in given), *biases])
        with dispatch.use(name), torch.no_grad():
            for few in (1, 2, 5):  # as many tokens as a step of decoding has
                one = experts(x[:few], indices[:few], weights[:few])[0]
                torch.testing.assert_close(one, y[:few].detach(), rtol=1e-4, atol=1e-5)
            nobody = experts(x[:2], torch.full((2, 3), -1), weights[:2])[0]
            assert not nobody.any() and nobody.shape == (2, 32)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_parts_are_added_before_they_are_rounded(mixed):
    """In bfloat16 the sum over parts is no further from the truth than that over one stack, but for a rounding each."""
    g = torch.Generator().manual_seed(1)
    x, weights = torch.randn(200, 32, generator=g), torch.rand(200, 3, generator=g)
    indices = torch.stack([torch.randperm(7, generator=g)[:3] for _ in range(200)])
    truth = decoded(mixed).blocks[0].moe.experts(x, indices, weights)[0]
    errors = []
    for model in (mixed, decoded(mixed)):
        experts = model.to(torch.bfloat16).blocks[0].moe.experts
        y = experts(x.bfloat16(), indices, weights)[0]
        assert y.dtype == torch.bfloat16
        errors.append(float((y.float() - truth).norm() / truth.norm()))
    assert errors[0] < 1.3 * errors[1] and errors[1] < 0.02


@torch.no_grad()
def test_masked_is_pruned_and_a_cut_is_proved(mixed, tokens, tmp_path):
    mixed = mixed.to(torch.bfloat16)
    kept = ((0, 1, 3, 6), (1, 2, 4, 5), (0, 1, 2, 3))  # the part of MXFP4 loses its only expert; layer 2 its int8 one
    plan = PrunePlan("list", "uniform", (7, 7, 7), 3, kept=kept)
    with mask(mixed, plan):
        masked = mixed(tokens)
    small = prune(mixed, plan)
    assert torch.equal(small(tokens).logits, masked.logits)
    assert list(small.blocks[0].moe.experts.down.parts) == [0, 1, 3, 4] and list(
        small.blocks[2].moe.experts.down.parts
    ) == [0]
    save(mixed, tmp_path / "source")
    prune_checkpoint(tmp_path / "source", plan, tmp_path / "cut")
    assert pruned_bytes(mixed, plan) == ShardReader(tmp_path / "cut").total_bytes
    back, _ = load(tmp_path / "cut")
    assert torch.equal(back(tokens).logits, masked.logits)
    assert {n: t.tolist() for n, t in back.state_dict().items()} == {
        n: t.tolist() for n, t in small.state_dict().items()
    }
    assert verify(tmp_path / "source", tmp_path / "cut").ok
    opened = Checkpoint(tmp_path / "cut")
    assert read(tmp_path / "cut")["after"]["parameters"] == opened.parameter_counts[0] == describe(small).parameters
    for name in ("gate_up.part", "gate_up.0.left", "down.1.values", "down.4.right.scales", "down.3"):
        info = opened.reader[f"blocks.0.moe.experts.{name}"]
        with open(info.file, "r+b") as file:
            file.seek(info.stop - 1)
            byte = file.read(1)
            file.seek(info.stop - 1)
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
        try:
            found = verify(tmp_path / "source", tmp_path / "cut")
            assert not found.ok and name in found.message
        except CheckpointError as e:  # another part than there are is found sooner still
            assert name == "gate_up.part" and "parts of" in str(e)
        with open(info.file, "r+b") as file:
            file.seek(info.stop - 1)
            file.write(byte)
    assert verify(tmp_path / "source", tmp_path / "cut").ok
    with pytest.raises(ConfigError, match="leave --pad out"):
        uneven = PrunePlan("list", "uniform", (7, 7, 7), 3, kept=((0, 1, 2, 3), (1, 2, 3), (0, 1, 2, 4)))
        prune_checkpoint(tmp_path / "source", uneven, tmp_path / "padded", pad=True)
    assert not (tmp_path / "padded").exists()


@torch.no_grad()
def test_it_is_recorded_judged_and_reduced_further(mixed, tokens, tmp_path):
    save(mixed, tmp_path / "source")
    stats, other = record_routing(mixed, [tokens], sample=30), record_routing(decoded(mixed), [tokens], sample=30)
    by_layer = record_checkpoint(tmp_path / "source", [tokens], sample=30)
    for a in (stats, by_layer):
        for layer in range(3):
            for x, y in zip(a.layer(layer), other.layer(layer)):
                torch.testing.assert_close(torch.as_tensor(x), torch.as_tensor(y), rtol=1e-4, atol=1e-6)
    for criterion in ("reap", "weight_norm", "aimer", "reconstruction"):
        plans = [plan_pruning(s, criterion, 4, model=m) for s, m in ((stats, mixed), (other, decoded(mixed)))]
        assert plans[0].kept == plans[1].kept
    one, stages = reduce(mixed, ["magnitude", "neurons", "int8"], 0.5, stats=stats)
    assert describe(one).expert_format == "low-rank-int8 and int8" and one.config.intermediate_size == 32
    assert stages[1].bytes_after < stages[1].bytes_before
    back, _ = reduce(mixed, ["int8"], experts=[(2, e) for e in range(7)])
    assert back.blocks[2].moe.experts.down.format == "int8"  # all alike again: an ordinary stack
    with pytest.raises(ConfigError, match=r"the experts of a layer differ in form, .* merge before reduce --experts"):
        again, _ = reduce(decoded(mixed), ["int8"], experts=SOME)
        merge(again, stats, "ream", 3)


def test_adapters_stand_beside_parts(mixed, tokens, tmp_path):
    save(mixed, tmp_path / "source")
    models = mixed, decoded(mixed)
    outputs = []
    for model in models:
        for name, lora in add_adapters(model, LoRAConfig(rank={"attention": 0, "experts": 2}), seed=3).items():
            with torch.no_grad():
                lora.b.copy_(torch.randn(lora.b.shape, generator=torch.Generator().manual_seed(len(name))))
        logits = model(tokens).logits
        logits.square().mean().backward()
        outputs.append([logits.detach(), *(p.grad for n, p in model.named_parameters() if "adapter" in n)])
    assert len(outputs[0]) == 1 + 3 * 2 * 2
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    (tmp_path / "adapter").mkdir()
    adapter_files.save(mixed, tmp_path / "adapter", Settings({"attention": 0, "experts": 2}, 16.0))
    back, _ = load(tmp_path / "source", adapter=tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits, outputs[0][0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"stored as mixed, .* would have to become dense; keep the adapter beside"):
        convert(tmp_path / "source", tmp_path / "merged", "native", adapter=tmp_path / "adapter")
    adapter_files.merge(back)
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits, outputs[0][0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_other_layouts_decode_it_and_keep_the_bytes_they_share(model, tokens, tmp_path):
    packed, _ = reduce(model, ["mxfp4"], experts=[(i, e) for i in range(3) for e in range(7)])
    assert "LARGER" in reduce(packed, ["int8"], experts=SOME)[1][0].line()
    small, (stage,) = reduce(packed, ["low-rank"], 0.3, experts=SOME)
    save(small, tmp_path / "native")
    expected = decoded(small)(tokens).logits
    for layout in ("hf-bf16", "hf-mxfp4", "openai"):
        convert(tmp_path / "native", tmp_path / layout, layout)
        back, _ = load(tmp_path / layout, dtype="float32")
        assert (back(tokens).logits - expected).norm() < 0.1 * expected.norm()
    reader = ShardReader(tmp_path / "hf-mxfp4")
    blocks = reader.tensor("model.layers.2.mlp.experts.gate_up_proj_blocks")
    old = packed.blocks[2].moe.experts.gate_up.blocks
    assert [torch.equal(a, b) for a, b in zip(blocks, old)] == [e not in (3, 5) for e in range(7)]
    save(packed, tmp_path / "source", "hf-mxfp4")
    save_changed(small, tmp_path / "source", tmp_path / "out", [{"name": "reduce", **stage._asdict()}])
    assert Checkpoint(tmp_path / "out").layout.name == "native"  # the source's own cannot hold it


@torch.no_grad()
def test_weights_in_the_order_of_the_cuda_kernels_are_zeroed_too(model):
    """They answer with copies of their bytes, into which nothing must be written."""
    from xmoe.kernels.cuda import backend

    packed, _ = reduce(model, ["mxfp4"])
    expected, _ = reduce(packed, ["magnitude"], 0.5)
    assert backend.prepare(packed) == 6
    found, (stage,) = reduce(packed, ["magnitude"], 0.5)
    assert all(
        torch.equal(a, b) for a, b in zip(found.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    assert stage.zeros >= stage.weights_after // 2


@torch.no_grad()
def test_parts_in_mxfp4_go_into_the_order_of_the_cuda_kernels(mixed, tmp_path):
    """gate_up's with gate and up rows paired, down's not; factors are none of those kernels' work. The file stays the same."""
    from xmoe.kernels.cuda import backend
    from xmoe.kernels.cuda.repack import RepackedWeight

    mixed, _ = reduce(mixed, ["mxfp4"], experts=[(0, 0), (0, 3)])
    values = [
        w.decode(dtype=torch.float32) for w in (mixed.blocks[0].moe.experts.gate_up, mixed.blocks[0].moe.experts.down)
    ]
    save(mixed, tmp_path / "before")
    assert backend.prepare(mixed) == 2 and backend.prepare(mixed) == 0
    experts = mixed.blocks[0].moe.experts
    for weight, paired, old in zip((experts.gate_up, experts.down), (True, False), values):
        kinds = {k: (type(w).__name__, getattr(w, "format", "dense")) for k, w in weight.parts.items()}
        assert kinds == {
            0: ("PackedFactors", "low-rank-mxfp4"), 1: ("PackedWeight", "int8"), 2: ("RepackedWeight", "mxfp4"),
            3: ("PackedWeight", "low-rank"), 4: ("PackedFactors", "low-rank-int4"),
        }  # fmt: skip
        assert isinstance(weight.parts[2], RepackedWeight) and weight.parts[2].paired == paired
        assert torch.equal(weight.decode(dtype=torch.float32), old)
    save(mixed, tmp_path / "after")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after")]
    assert files[0] == files[1]


def test_damaged_parts_are_named(mixed, tmp_path):
    from safetensors.torch import load_file, save_file

    save(mixed, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    whole = load_file(file)
    at = "blocks.0.moe.experts"
    part = whole[f"{at}.gate_up.part"]
    changes = {
        "parts of": {f"{at}.gate_up.part": torch.full_like(part, 3)},
        "part the experts differently": {f"{at}.gate_up.part": part[[1, 0, *range(2, 7)]].contiguous()},
        "missing": {f"{at}.down.2.scales": None},
        "another shape": {f"{at}.down.4.left.scales": whole[f"{at}.down.4.left.scales"][:, :5].contiguous()},
        "left over": {f"{at}.down.nine": torch.zeros(3)},
        "where U8 was expected": {f"{at}.gate_up.part": part.float()},
        "one factor is packed": {
            **{n: None for n in whole if n.startswith(f"{at}.down.4.left")}, f"{at}.down.4.left": torch.zeros(1, 32, 32),
        },
    }  # fmt: skip
    for message, change in changes.items():
        save_file({n: t for n, t in {**whole, **change}.items() if t is not None}, file)
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "out")
