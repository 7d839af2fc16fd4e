"""Projections held in int8: what they decode to, what reads them, and what refuses them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xmoe.checkpoint import adapters, projections
from xmoe.checkpoint.weights import load, save
from xmoe.errors import CheckpointError, ConfigError
from xmoe.generation.generate import generate
from xmoe.kernels import memory
from xmoe.model.adapter import Settings, attach
from xmoe.model.config import preset
from xmoe.model.describe import describe
from xmoe.model.perplexity import mean_loss
from xmoe.quantization.packed import PackedWeight

PROJECTIONS = {"head.weight", *(f"blocks.{i}.attn.{n}.weight" for i in range(4) for n in ("qkv", "out"))}


@torch.no_grad()
def unrounded(model, like):
    """`like`'s dense model with the values that `model`'s packed projections decode to."""
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight) and name in PROJECTIONS:
            like.get_parameter(name).copy_(module.decode(dtype=torch.float32)[0])
    return like


@pytest.mark.parametrize("layout", ["hf-mxfp4", "openai"])
@torch.no_grad()
def test_the_rest_of_the_model_stays_and_logits_are_those_of_the_decoded_weights(published, layout):
    folder, g = published(layout), torch.Generator().manual_seed(1)
    stored, rounded = load(folder, dtype="float32")[0], load(folder, dtype="float32", projections="int8")[0]
    packed = {n for n, m in rounded.named_modules() if isinstance(m, PackedWeight) and "experts" not in n}
    assert packed == PROJECTIONS
    theirs = stored.state_dict()
    kept = {n: t for n, t in rounded.state_dict().items() if not n.startswith(tuple(PROJECTIONS))}
    assert len(kept) == len(theirs) - len(PROJECTIONS) and all(torch.equal(t, theirs[n]) for n, t in kept.items())
    before = stored.head.weight.clone()
    for shape in ((1, 40), (3, 2)):
        tokens = torch.randint(stored.config.vocab_size, shape, generator=g)
        moved = (rounded(tokens).logits - stored(tokens).logits).norm() / stored(tokens).logits.norm()
        assert moved > 1e-4  # rounding did happen
        unrounded(rounded, stored)
        torch.testing.assert_close(rounded(tokens).logits, stored(tokens).logits, rtol=0, atol=2e-5)
        stored.head.weight.copy_(before)  # so that the next shape sees a difference, too
    targets = torch.randint(stored.config.vocab_size, (1, 40), generator=g)
    batches = [(targets[:, :-1], targets[:, 1:])]
    assert mean_loss(rounded, batches) == pytest.approx(mean_loss(unrounded(rounded, stored), batches), rel=1e-5)


@settings(max_examples=30)
@given(rows=st.integers(1, 40), groups=st.integers(1, 5), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_values_are_within_half_a_step_in_any_pieces(rows, groups, scale, seed):
    weight = torch.randn(rows, 32 * groups, generator=torch.Generator().manual_seed(seed)) * scale
    packed = projections.in_int8("head.weight", weight)
    assert packed.shape == (1, rows, 32 * groups) and packed.nbytes == rows * groups * 34
    step = packed.scales.float().repeat_interleave(32, dim=-1)[0]
    assert ((packed.decode(dtype=torch.float32)[0] - weight).abs() <= step * 0.5001).all()


def test_large_weights_are_rounded_piece_by_piece(monkeypatch):
    weight = torch.randn(23, 64)
    whole = projections.in_int8("head.weight", weight)
    monkeypatch.setattr(projections, "_PIECE", 300)  # four rows, the last piece smaller
    monkeypatch.setattr(memory, "HUGE", 512)  # and into huge pages, where there are any
    pieces = projections.in_int8("head.weight", weight)
    assert all(torch.equal(a, pieces.tensors[n]) for n, a in whole.tensors.items())


def test_tied_embeddings_stay_as_they_are(random_model, tmp_path):
    save(random_model(preset("tiny", hidden_size=64, head_dim=16, tie_word_embeddings=True)), tmp_path / "m")
    model, _ = load(tmp_path / "m", projections="int8")
    assert isinstance(model.blocks[0].attn.out.weight, PackedWeight) and model.head is None
    assert model.unembedding is model.embed.weight


def test_it_speaks_and_says_what_it_is(published):
    folder = published("hf-mxfp4")
    stored, rounded = load(folder)[0], load(folder, projections="int8", huge_pages=True)[0]
    said = generate(rounded, None, [[1, 2, 3]], max_new_tokens=12, temperature=0)
    assert len(said[0].ids) == 12
    assert "experts in mxfp4; projections in int8" in str(describe(rounded))
    assert "projections" not in str(describe(stored)) and describe(rounded).bytes < describe(stored).bytes
    assert describe(rounded).parameters == describe(stored).parameters


def test_an_adapter_of_the_stored_weights_speaks_beside_rounded_ones(published, tmp_path):
    folder = published("hf-mxfp4")
    model = load(folder)[0]
    for lora in attach(model, Settings({"attention": 2, "experts": 2}, alpha=8.0)).values():
        for part in (lora.a, lora.b):
            torch.nn.init.normal_(part, std=0.2, generator=torch.Generator().manual_seed(part.numel()))
    (tmp_path / "adapter").mkdir()
    adapters.save(model, tmp_path / "adapter", Settings({"attention": 2, "experts": 2}, alpha=8.0), base=str(folder))
    plain, adapted = (load(folder, adapter=a, projections="int8")[0] for a in (None, tmp_path / "adapter"))
    tokens = torch.arange(30).view(1, 30)
    with torch.no_grad():
        stored, found, without = (m(tokens).logits.float() for m in (model, adapted, plain))
    assert (found - stored).norm() < 0.25 * (without - stored).norm()
    with pytest.raises(ConfigError, match="held in int8; adapters stand beside the stored weights"):
        attach(plain, Settings({"attention": 2}, alpha=8.0))


def test_a_change_of_the_models_type_leaves_the_scales(published):
    model = load(published("hf-mxfp4"), projections="int8")[0].float()
    assert model.head.weight.scales.dtype == torch.bfloat16 and model.norm.weight.dtype == torch.float32
    hidden = torch.randn(2, 64)
    with torch.no_grad():
        expected = hidden @ model.head.weight.decode(dtype=torch.float32)[0].t()
        torch.testing.assert_close(model.unembed(hidden), expected, rtol=1e-4, atol=1e-5)


def test_refusals(published, random_model, tmp_path):
    folder = published("hf-mxfp4")
    with pytest.raises(ConfigError, match="choose stored or int8"):
        load(folder, projections="int4")
    with pytest.raises(ConfigError, match="for the CPU, and the device is meta"):
        projections.check_choice("int8", torch.device("meta"))
    with pytest.raises(ConfigError, match=r"groups of 32, and blocks\.0\.attn\.qkv\.weight has 40"):
        save(random_model(preset("tiny", hidden_size=40)), tmp_path / "narrow")
        load(tmp_path / "narrow", projections="int8")
    with pytest.raises(ConfigError, match="without projections='int8' to save it"):
        save(load(folder, projections="int8")[0], tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(CheckpointError, match="NaN"):
        projections.in_int8("head.weight", torch.full((2, 32), float("nan")))
