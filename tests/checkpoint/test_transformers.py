"""transformers as the referee: it computes on weights written by hand, and it opens what we export."""

import dataclasses
import json

import pytest
import torch

from xmoe.checkpoint.weights import convert, load, save
from xmoe.model.config import preset

transformers = pytest.importorskip("transformers")

SHAPES = {
    "plain": {},
    "layer types of its own": {
        "num_hidden_layers": 5,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "five experts, three a token": {"num_local_experts": 5, "num_experts_per_tok": 3, "num_hidden_layers": 2},
    "real head geometry": {
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 2, "hidden_size": 96,
    },
    "factor 32, far beyond the original context": {"factor": 32.0, "initial_context_length": 64, "num_hidden_layers": 2},
    "one key-value head, odd window": {"num_attention_heads": 3, "num_key_value_heads": 1, "sliding_window": 13},
    "no scaling": {"factor": 1.0, "initial_context_length": 512, "num_hidden_layers": 2},
}  # fmt: skip


@pytest.fixture
def reference(by_hand):
    """(shape, dtype) -> GptOssForCausalLM on the dequantized weights; nothing of ours takes part."""

    def make(shape: dict, dtype=torch.float32):
        config = transformers.GptOssConfig(**by_hand.hf_config(shape, packed=False), attn_implementation="eager")
        model = transformers.GptOssForCausalLM(config).to(dtype)
        tensors = {n: t.to(dtype) for n, t in by_hand.dense(by_hand.tensors(shape)).items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not missing and not unexpected
        return model.eval()

    return make


def tokens_of(shape: dict, length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(shape["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_routers_and_hidden_states(published, name, reference, by_hand):
    changes = SHAPES[name]
    shape = by_hand.shape_of(**changes)
    tokens = tokens_of(shape, 400 if shape["factor"] > 4 else 70)
    theirs = reference(shape)(tokens, output_hidden_states=True, output_router_logits=True, use_cache=False)
    layouts = ["hf-mxfp4", "hf-bf16"] + (["openai"] if "layer_types" not in changes else [])
    for layout in layouts:
        model, _ = load(published(layout, **changes), dtype="float32", experts="dense")
        hidden = []
        hooks = [b.register_forward_hook(lambda m, i, o, seen=hidden: seen.append(o[0])) for b in model.blocks]
        ours = model(tokens)
        for hook in hooks:
            hook.remove()
        assert (ours.logits - theirs.logits).abs().max() <= 1e-4, layout
        assert theirs.logits.std() > 0.5  # logits of zero would prove nothing
        for routing, logits in zip(ours.routing, theirs.router_logits, strict=True):
            assert (routing.logits - logits.view_as(routing.logits)).abs().max() <= 1e-4
        for a, b in zip(hidden[:-1], theirs.hidden_states[1:-1], strict=True):  # theirs ends with the normed state
            assert (a - b).abs().max() <= 1e-4


@torch.no_grad()
def test_long_sequence_to_the_last_digits(published, reference, by_hand):
    """300 tokens, window 128: tight enough to see a lower clamp of the gate or an alpha of 1.7."""
    changes = {"sliding_window": 128, "initial_context_length": 128}
    shape = by_hand.shape_of(**changes)
    tokens = tokens_of(shape, 300, batch=1)
    theirs = reference(shape)(tokens, use_cache=False).logits
    ours = load(published("hf-mxfp4", **changes), dtype="float32", experts="dense")[0](tokens).logits
    assert (ours - theirs).abs().max() <= 2e-5


@torch.no_grad()
def test_greedy_text_is_the_same(published, reference, by_hand):
    shape = by_hand.shape_of()
    model = load(published("hf-mxfp4"), dtype="float32", experts="dense")[0]
    ours = tokens_of(shape, 20, batch=1)
    theirs = reference(shape).generate(ours, do_sample=False, max_new_tokens=24, pad_token_id=0)
    for _ in range(24):
        ours = torch.cat((ours, model(ours).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_bfloat16_stays_close_to_float32_and_to_transformers(published, reference, by_hand):
    shape = by_hand.shape_of()
    tokens = tokens_of(shape, 200)
    folder = published("hf-mxfp4")
    exact = load(folder, dtype="float32", experts="dense")[0](tokens).logits
    theirs = reference(shape, torch.bfloat16)(tokens, use_cache=False).logits
    for experts in ("mxfp4", "dense"):
        rounded = load(folder, dtype="bfloat16", experts=experts)[0](tokens).logits.float()
        for other in (exact, theirs.float()):
            assert (rounded - other).norm() <= 0.06 * other.norm()
            assert (rounded.argmax(-1) == other.argmax(-1)).float().mean() >= 0.85


def opened(folder, dtype=torch.float32):
    """The folder as transformers loads it, decoding MXFP4 itself; every tensor found and none left over."""
    packed = "quantization_config" in json.loads((folder / "config.json").read_text())
    decode = {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if packed else {}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True, **decode
    )
    problems = {k: v for k, v in report.items() if v}
    assert not problems, problems
    return model.eval()


@pytest.mark.parametrize("layout", ["hf-mxfp4", "hf-bf16"])
@torch.no_grad()
def test_exports_load_in_transformers_with_the_same_logits(published, tmp_path, layout, by_hand):
    folder = published("openai")
    convert(folder, tmp_path / "export", layout)
    tokens = tokens_of(by_hand.shape_of(), 70)
    ours = load(folder, dtype="float32", experts="dense")[0](tokens).logits
    theirs = opened(tmp_path / "export")(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("layout", ["hf-mxfp4", "hf-bf16"])
@torch.no_grad()
def test_a_model_trained_here_exports(random_model, tmp_path, layout):
    """Tied embeddings, float32 weights, dense experts and plain or scaled RoPE, as our own variants have."""
    for changes in ({"tie_word_embeddings": True}, {"rope_scaling_factor": 1.0, "initial_context_length": 512}):
        model = random_model(preset("tiny", **changes))
        save(model, tmp_path / "export", layout=layout, dtype="float32", overwrite=True)
        tokens = tokens_of({"vocab_size": 320}, 90)
        again = load(tmp_path / "export", experts="dense")[0](tokens).logits
        assert (opened(tmp_path / "export")(tokens).logits - again).abs().max() <= 1e-4
        if layout == "hf-bf16":
            assert (again - model(tokens).logits).abs().max() <= 1e-4


@torch.no_grad()
def test_what_transformers_saves_is_opened_here(published, tmp_path, reference, by_hand):
    """transformers 5 writes rope_parameters, and num_local_experts only."""
    shape = by_hand.shape_of()
    theirs = reference(shape)
    theirs.save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved/config.json").read_text())
    assert "rope_parameters" in content or "rope_scaling" in content
    model, _ = load(tmp_path / "saved")
    tokens = tokens_of(shape, 70)
    assert (model(tokens).logits - theirs(tokens).logits).abs().max() <= 1e-4
    assert model.config == load(published("hf-bf16"))[0].config


@torch.no_grad()
def test_pruned_rows_equal_masked_logits_in_transformers(published, tmp_path, by_hand):
    """Survivors of an export keep their bytes, so a smaller checkpoint is the larger one with some logits at -inf."""
    folder = published("hf-mxfp4")
    model, _ = load(folder, dtype="float32")
    kept = [0, 2, 3, 5, 7]
    tokens = tokens_of(by_hand.shape_of(), 70)
    for block in model.blocks:
        block.moe.router.keep_only(kept)
    masked = model(tokens).logits
    for block in model.blocks:
        router, experts = block.moe.router, block.moe.experts
        router.keep_only(None)
        for owner, name in ((router, "weight"), (router, "bias"), (experts, "gate_up_bias"), (experts, "down_bias")):
            setattr(owner, name, torch.nn.Parameter(getattr(owner, name)[kept]))
        for name in ("gate_up", "down"):
            experts.pack(name, getattr(experts, name).select_experts(kept))
    model.config = dataclasses.replace(model.config, num_experts=len(kept))
    save(model, tmp_path / "pruned", layout="hf-mxfp4", dtype="float32", extra={"kept_experts": [kept] * 4})
    theirs = opened(tmp_path / "pruned")
    assert theirs.config.num_local_experts == 5 and theirs.config.kept_experts == [kept] * 4
    assert (theirs(tokens).logits - masked).abs().max() <= 1e-4
