"""Adapters from the first step to the merged checkpoint: the base never moves, and nothing of what was learned is lost."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from xmoe.checkpoint import adapters, train_state, weights
from xmoe.compression.apply import prune
from xmoe.compression.plan import PrunePlan
from xmoe.config import load_config
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import CheckpointError, ConfigError
from xmoe.model.adapter import GROUPS, LoRA, attach, detach
from xmoe.model.config import preset
from xmoe.model.transformer import build
from xmoe.quantization.packed import PackedWeight
from xmoe.training.adapters import LoRAConfig, add_adapters
from xmoe.training.config import RunConfig
from xmoe.training.optim import Optimizer
from xmoe.training.trainer import Trainer, train

EVERYTHING = LoRAConfig(rank={"attention": 5, "experts": 3, "router": 2}, alpha=6.0)
RUN = """
data: {{source: {folder}/page.txt, seq_len: 16, document_separator: pieces, validation_fraction: 0.3, validation_tokens: 300}}
optim: {{name: adamw, lr: 1e-2, weight_decay: 0, warmup_steps: 2}}
lora: {{rank: {{attention: 5, experts: 3, router: 2}}, alpha: 6}}
train:
  {{init_from: {folder}/base, steps: 12, micro_batch: 3, save_every: 4, validate_every: 5, device: cpu, precision: float32,
  load_balancing_coef: 0}}
log: {{every: 3}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base: a packed checkpoint; native: the same in another layout; other: one of the same shape. page.txt, lora.yaml."""
    folder = tmp_path_factory.mktemp("adapters")
    tokenizer = Tokenizer.of_bytes()
    shape = {"num_hidden_layers": 2, "num_experts": 6, "reasoning_effort": None, "vocab_size": tokenizer.vocab_size}
    for name, seed in (("base", 0), ("other", 1)):
        weights.save(build(preset("tiny", **shape), seed=seed), folder / name, "hf-mxfp4", tokenizer=tokenizer)
    weights.convert(folder / "base", folder / "native", "native")
    draw = random.Random(0)
    words = ["the", "cat", "and", "a", "dog", "sat", "on", "mat", "while", "two", "birds", "sang", "of", "rain"]
    lines = [" ".join(draw.choices(words, k=9)) + "." + "\n" * (1 + (i % 5 == 0)) for i in range(900)]
    (folder / "page.txt").write_text("".join(lines))
    (folder / "lora.yaml").write_text(RUN.format(folder=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XMOE_CACHE", str(folder / "cache"))
        yield folder


def go(folder, output, *overrides, **options):
    return train(folder / "lora.yaml", overrides, output=output, console=io.StringIO(), **options)


@pytest.fixture(scope="module")
def finished(folder):
    before = fingerprint(folder / "base")
    run = go(folder, folder / "run", "train.steps=40")
    assert fingerprint(folder / "base") == before
    return run


def fingerprint(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def randomize(model) -> None:
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for lora in adapters.adapters(model).values():
            lora.b.copy_(torch.randn(lora.b.shape, generator=g) * 0.05)


def tokens_of(count: int = 70) -> torch.Tensor:
    return torch.randint(0, 250, (2, count), generator=torch.Generator().manual_seed(9))


# ------------------------------------------------------------------------------------------------------------ the start


@pytest.mark.parametrize("length", [4, 70, 400])  # few tokens and many take different products
@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_the_start_is_the_base_bit_for_bit(folder, dtype, experts, length):
    base, _ = weights.load(folder / "base", dtype=dtype, experts=experts)
    model, _ = weights.load(folder / "base", dtype=dtype, experts=experts)
    added = add_adapters(model, EVERYTHING)
    assert all(bool(lora.a.any()) and not lora.b.any() for lora in added.values())
    assert len(added) == 2 * sum(len(w) for w in GROUPS.values())
    tokens = tokens_of(length)
    ours, theirs = model(tokens), base(tokens)
    assert torch.equal(ours.logits, theirs.logits)
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(ours.routing, theirs.routing))
    randomize(model)
    assert not torch.equal(model(tokens).logits, theirs.logits)
    detach(model)
    assert torch.equal(model(tokens).logits, theirs.logits)


def test_only_adapters_are_trained_and_packed_experts_stay_packed(folder):
    model, _ = weights.load(folder / "base")
    add_adapters(model, LoRAConfig(rank={"experts": 4}, layers=(1,)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    stem = "blocks.1.moe.experts."
    assert trained == [f"{stem}{w}_adapter.{part}" for w in ("gate_up", "down") for part in "ab"]
    assert isinstance(model.blocks[1].moe.experts.gate_up, PackedWeight)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="has adapters already"):
        add_adapters(model, EVERYTHING)


@pytest.mark.parametrize("rslora, scale", [(False, 6 / 3), (True, 6 / 3**0.5)])
def test_the_scale_of_each_group_follows_its_rank(folder, rslora, scale):
    model, _ = weights.load(folder / "base")
    added = add_adapters(model, LoRAConfig(rank=EVERYTHING.rank, alpha=6.0, rslora=rslora))
    assert added["blocks.0.moe.experts.down"].scale == pytest.approx(scale)


def test_gradients_of_a_packed_model_are_those_of_the_dense_sum(folder):
    """The whole network in fp32, against one whose weights are W + scale b a in plain torch."""
    model, _ = weights.load(folder / "base", dtype="float32")
    add_adapters(model, EVERYTHING)
    randomize(model)
    dense, _ = weights.load(folder / "base", dtype="float32", experts="dense")
    sums = {}
    for name, lora in adapters.adapters(model).items():
        a, b = lora.a.detach().clone().requires_grad_(), lora.b.detach().clone().requires_grad_()
        owner, _, leaf = name.rpartition(".")
        module = dense.get_submodule(owner)
        merged = getattr(module, leaf).detach() + lora.scale * b @ a
        delattr(module, leaf)
        setattr(module, leaf, merged)
        sums[name] = a, b
    ours, theirs = model(tokens_of()), dense(tokens_of())
    assert (ours.logits - theirs.logits).abs().max() < 1e-5
    probe = torch.randn(ours.logits.shape, generator=torch.Generator().manual_seed(1))
    (ours.logits * probe).sum().backward()
    (theirs.logits * probe).sum().backward()
    for name, lora in adapters.adapters(model).items():
        for mine, truth in zip((lora.a, lora.b), sums[name]):
            assert (mine.grad - truth.grad).norm() / truth.grad.norm() < 1e-5, name


# ---------------------------------------------------------------------------------------------------------- training


def test_a_run_learns_beside_a_base_that_stays_as_it_is(folder, finished):
    lines = [json.loads(text) for text in (finished.checkpoint / "metrics.jsonl").read_text().splitlines()]
    losses = [line["lm_loss"] for line in lines if "lm_loss" in line]
    assert losses[-1] < losses[0] - 0.4 and finished.loss < losses[0] - 0.4
    names = {"adapter.json", "adapter.safetensors", "run.yaml", "metrics.jsonl", "train_state"}
    assert {p.name for p in finished.checkpoint.iterdir()} == names
    about = json.loads((finished.checkpoint / "adapter.json").read_text())
    assert about["rank"] == EVERYTHING.rank and about["alpha"] == 6.0 and about["base"].endswith("base")


def test_the_file_gives_the_model_that_was_trained(folder, finished):
    """Its validation loss, beside the base in either layout."""
    run = Trainer(load_config(RunConfig, finished.checkpoint / "run.yaml"), finished.checkpoint, resume=True)
    assert run.validate()["val_loss"] == finished.loss
    logits = [
        weights.load(folder / name, dtype="float32", adapter=finished.checkpoint)[0](tokens_of()).logits
        for name in ("base", "native")
    ]
    assert torch.equal(*logits) and torch.equal(logits[0], run.model(tokens_of()).logits)


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("stop", [5, 9])
def test_a_run_killed_at_any_step_ends_as_the_run_that_was_not(folder, tmp_path, monkeypatch, stop):
    go(folder, tmp_path / "whole")
    step = Optimizer.step
    with monkeypatch.context() as patch:

        def killed(self, number):
            if number == stop:
                raise Killed
            step(self, number)

        patch.setattr(Optimizer, "step", killed)
        with pytest.raises(Killed):
            go(folder, tmp_path / "run")
    assert train_state.saved_steps(tmp_path / "run") == [stop // 4 * 4]
    go(folder, tmp_path / "run", resume=True)
    files = [(tmp_path / name / adapters.TENSORS).read_bytes() for name in ("whole", "run")]
    assert files[0] == files[1]
    curves = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "run")]
    ours, theirs = ([{k: v for k, v in json.loads(t).items() if k != "tokens_per_second"} for t in c] for c in curves)
    assert ours == theirs


def test_all_weights_can_be_trained_from_a_checkpoint_too(folder, tmp_path):
    """And the new run folder is a checkpoint: its start is the base's loss, its end is lower."""
    text = (
        (folder / "lora.yaml").read_text().replace("lora: {rank: {attention: 5, experts: 3, router: 2}, alpha: 6}", "")
    )
    (tmp_path / "full.yaml").write_text(text)
    trainer = Trainer(
        load_config(RunConfig, tmp_path / "full.yaml", ["train.steps=20"]), tmp_path / "run", console=io.StringIO()
    )
    base, tokenizer = weights.load(folder / "base", dtype="float32", experts="dense")
    with torch.no_grad():
        assert torch.equal(trainer.model(tokens_of()).logits, base(tokens_of()).logits)
    before = trainer.validate()["val_loss"]
    run = trainer.run()
    assert run.loss < before - 0.5
    found, its_tokenizer = weights.load(tmp_path / "run")
    assert found.config == base.config and its_tokenizer.fingerprint == tokenizer.fingerprint


# ------------------------------------------------------------------------------------------------------------- merging


@torch.no_grad()
def test_merged_dense_logits_are_the_adapters(folder, finished, tmp_path):
    tokens = tokens_of()
    beside, _ = weights.load(folder / "base", dtype="float32", adapter=finished.checkpoint)
    base, _ = weights.load(folder / "base", dtype="float32")
    assert (beside(tokens).logits - base(tokens).logits).abs().max() > 0.1  # there is something to merge
    for layout in ("native", "hf-bf16"):
        out = weights.convert(folder / "base", tmp_path / layout, layout, "float32", adapter=finished.checkpoint)
        merged, _ = weights.load(out)
        assert (merged(tokens).logits - beside(tokens).logits).abs().max() < 1e-5
        assert json.loads((out / adapters.MERGED).read_text())["mxfp4_relative_error"] is None
    adapters.merge(beside)
    assert not adapters.adapters(beside)
    assert (merged(tokens).logits - beside(tokens).logits).abs().max() < 1e-5


@torch.no_grad()
def test_merged_mxfp4_is_as_near_as_the_format_allows(folder, finished, tmp_path):
    out = weights.convert(folder / "base", tmp_path / "merged", "hf-mxfp4", adapter=finished.checkpoint)
    told = json.loads((out / adapters.MERGED).read_text())
    packed, _ = weights.load(out, dtype="float32")
    base, _ = weights.load(folder / "base", dtype="float32")
    dense, _ = weights.load(folder / "base", dtype="float32", experts="dense", adapter=finished.checkpoint)
    adapters.merge(dense)
    sums = torch.zeros(4, dtype=torch.float64)
    for ours, theirs, before in zip(packed.blocks, dense.blocks, base.blocks):
        for name in ("gate_up", "down"):
            rounded, truth, start = (getattr(b.moe.experts, name) for b in (ours, theirs, before))
            rounded, start, truth = (
                rounded.decode(dtype=torch.float32),
                start.decode(dtype=torch.float32),
                truth.detach(),
            )
            groups = truth.unflatten(-1, (-1, 32))
            error = (rounded - truth).unflatten(-1, (-1, 32))
            assert bool((error.abs().amax(-1) <= groups.abs().amax(-1) / 4 + 1e-7).all())  # saturation at worst
            change = truth - start
            sums += torch.stack(
                [error.square().sum(), truth.square().sum(), ((rounded - start) * change).sum(), change.square().sum()]
            )
    assert told["mxfp4_relative_error"] == pytest.approx(float((sums[0] / sums[1]).sqrt()), rel=1e-3)
    assert told["mxfp4_change_kept"] == pytest.approx(float(sums[2] / sums[3]), rel=1e-3)
    assert 0.01 < told["mxfp4_relative_error"] < 0.15 and 0.5 < told["mxfp4_change_kept"] < 1.1


@torch.no_grad()
def test_transformers_opens_what_was_merged(folder, finished, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = weights.convert(folder / "base", tmp_path / "merged", "hf-mxfp4", adapter=finished.checkpoint)
    ours, _ = weights.load(out, dtype="float32")
    config = transformers.Mxfp4Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, quantization_config=config, dtype=torch.float32)
    tokens = tokens_of()
    assert (theirs.eval()(tokens).logits - ours(tokens).logits).abs().max() < 1e-3


def test_gate_and_up_keep_their_rows(folder):
    """A change of ups alone is in the odd rows of the merged weight alone."""
    model, _ = weights.load(folder / "base", dtype="float32")
    before = model.blocks[0].moe.experts.gate_up.decode(dtype=torch.float32)
    add_adapters(model, EVERYTHING)
    with torch.no_grad():
        model.blocks[0].moe.experts.gate_up_adapter.b[:, 1::2] = 0.1
        adapters.merge(model)
    change = model.blocks[0].moe.experts.gate_up.detach() - before
    assert not change[:, 0::2].any() and bool(change[:, 1::2].any())


# ------------------------------------------------------------------------------------------------------------ refusals


def test_an_adapter_of_another_model_is_refused(folder, finished, tmp_path):
    with pytest.raises(CheckpointError, match="was trained beside another model"):
        weights.load(folder / "other", adapter=finished.checkpoint)
    out = weights.convert(folder / "base", tmp_path / "merged", "native", adapter=finished.checkpoint)
    with pytest.raises(CheckpointError, match="was trained beside another model"):  # merging twice
        weights.load(out, adapter=finished.checkpoint)


def test_damaged_files_are_refused(folder, finished, tmp_path):
    def damage(name: str, content: bytes | None) -> Path:
        broken = tmp_path / f"{name}-{len(content or b'')}"
        shutil.copytree(finished.checkpoint, broken, ignore=shutil.ignore_patterns("train_state"))
        (broken / name).unlink() if content is None else (broken / name).write_bytes(content)
        return broken

    tensors = (finished.checkpoint / adapters.TENSORS).read_bytes()
    about = json.loads((finished.checkpoint / adapters.ABOUT).read_text())
    for name, content, message in (
        (adapters.TENSORS, tensors[:-100], "is truncated"),
        (adapters.TENSORS, None, "holds no adapter"),
        (adapters.ABOUT, b"{", "is no JSON"),
        (adapters.ABOUT, json.dumps(about | {"alpha": "much"}).encode(), r"malformed \(alpha\)"),
        (adapters.ABOUT, json.dumps(about | {"rank": {"attention": 5, "experts": 4}}).encode(), "does not fit"),
        (adapters.ABOUT, json.dumps(about | {"layers": [7]}).encode(), "has layers 0 to 1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            weights.load(folder / "base", adapter=damage(name, content))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rank": {"attn": 4}}, "did you mean attention?"),
        ({"rank": {"expert": 4}}, "did you mean experts?"),
        ({"rank": {"q_proj": 4}}, "did you mean attention?"),
        ({"rank": {"attention": 0, "experts": 0}}, "no group a rank above 0"),
        ({"rank": {"experts": -1}}, "expected 0"),
        ({"alpha": 0.0}, "above 0"),
        ({"layers": ()}, "from 0 on"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ConfigError) as error:
        LoRAConfig(**given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_runs_that_make_no_sense_are_refused(folder, tmp_path):
    for overrides, message in (
        (["train.init_from=null"], "model is missing"),
        (["train.init_from=null", "model.preset=tiny"], "name its checkpoint in train.init_from"),
        (["train.selection_bias_rate=0.1"], "lora leaves as it is"),
        (["lora.layers=[5]"], "has layers 0 to 1"),
        (["lora.lora_alpha=3"], "did you mean lora.alpha"),
        (["model.preset=tiny"], "leave that section out"),
    ):
        with pytest.raises(ConfigError, match=message):
            go(folder, tmp_path / "run", *overrides)
        assert not (tmp_path / "run").exists()
    shutil.copytree(folder / "run", tmp_path / "begun")
    with pytest.raises(ConfigError, match=r"lora\.alpha was 6\.0, is 7\.0"):
        go(folder, tmp_path / "begun", "train.steps=50", "lora.alpha=7", resume=True)
    with pytest.raises(ConfigError, match=r"began from .*base with adapters and cannot go on from .*other"):
        go(folder, tmp_path / "begun", "train.steps=50", f"train.init_from={folder}/other", resume=True)


def test_saving_a_model_that_still_has_adapters_says_what_to_do(folder, tmp_path):
    model, _ = weights.load(folder / "base")
    attach(model, EVERYTHING.settings)
    with pytest.raises(ConfigError, match="merge adapters first"):
        weights.save(model, tmp_path / "out")
    assert isinstance(model.blocks[0].attn.qkv.adapter, LoRA)


@pytest.mark.parametrize("form, options", [("int8", {}), ("low-rank", {"rank": 3})])
def test_a_merge_into_experts_that_cannot_hold_a_sum_is_refused(form, options, folder, tmp_path):
    """Adding to them would silently make them dense, several times their size."""
    model = build(preset("tiny", num_hidden_layers=2, reasoning_effort=None))
    for block in model.blocks:
        block.moe.experts.pack("down", PackedWeight.encode(block.moe.experts.down.detach(), form, **options))
    weights.save(model, tmp_path / "reduced", "native")
    attach(model, EVERYTHING.settings)
    (tmp_path / "adapter").mkdir()
    adapters.save(model, tmp_path / "adapter", EVERYTHING.settings)
    with pytest.raises(ConfigError, match=f"stored as {form}.*--adapter"):
        weights.convert(tmp_path / "reduced", tmp_path / "merged", "native", adapter=tmp_path / "adapter")
    assert not (tmp_path / "merged").exists()


def test_a_model_with_adapters_is_not_cut():
    model = build(preset("tiny", num_hidden_layers=2))
    plan = PrunePlan("list", "uniform", (model.config.experts_in_layer(0),) * 2, 2, kept=((0, 1, 2, 3),) * 2)
    add_adapters(model, EVERYTHING)
    with pytest.raises(ConfigError, match="merge them first"):
        prune(model, plan)
