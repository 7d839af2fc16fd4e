"""The tables against the published facts, without allocating a single weight."""

import math

import pytest
import torch

from xmoe.checkpoint.layouts import LAYOUTS, detect, from_native, mismatch, native_shapes, stored_shapes, to_native
from xmoe.errors import CheckpointError
from xmoe.model.config import preset
from xmoe.model.transformer import Transformer

FACTS = {  # preset: parameters, {layout: (tensors, bytes)}
    "gpt_oss_20b": (
        20_914_757_184,
        {"hf-mxfp4": (459, 13_761_264_768), "hf-bf16": (411, 41_829_514_368), "openai": (363, 13_761_264_768)},
    ),
    "gpt_oss_120b": (
        116_829_156_672,
        {"hf-mxfp4": (687, 65_248_815_744), "hf-bf16": (615, 233_658_313_344), "openai": (543, 65_248_815_744)},
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_published_counts(name):
    config = preset(name)
    parameters, layouts = FACTS[name]
    shapes = native_shapes(config)
    assert sum(map(math.prod, shapes.values())) == parameters == config.parameter_count()
    for layout, (tensors, nbytes) in layouts.items():
        stored, total = {}, 0
        for rule in LAYOUTS[layout].rules(config):
            part = stored_shapes(rule, config, shapes[rule.native])
            assert not part.keys() & stored.keys()
            stored |= part
            total += sum(map(math.prod, part.values())) * (1 if rule.kind == "packed" else 2)
        assert (len(stored), total) == (tensors, nbytes)


def test_published_shapes_by_name():
    config = preset("gpt_oss_20b")
    shapes = native_shapes(config)
    found = {}
    for layout in ("hf-mxfp4", "hf-bf16", "openai"):
        for rule in LAYOUTS[layout].rules(config):
            found |= stored_shapes(rule, config, shapes[rule.native])
    layer = "model.layers.23."
    expected = {
        "model.embed_tokens.weight": (201088, 2880),
        "lm_head.weight": (201088, 2880),
        layer + "self_attn.q_proj.weight": (4096, 2880),
        layer + "self_attn.k_proj.bias": (512,),
        layer + "self_attn.o_proj.weight": (2880, 4096),
        layer + "self_attn.sinks": (64,),
        layer + "mlp.router.weight": (32, 2880),
        layer + "mlp.experts.gate_up_proj_blocks": (32, 5760, 90, 16),
        layer + "mlp.experts.gate_up_proj_scales": (32, 5760, 90),
        layer + "mlp.experts.down_proj_blocks": (32, 2880, 90, 16),
        layer + "mlp.experts.gate_up_proj": (32, 2880, 5760),
        layer + "mlp.experts.down_proj": (32, 2880, 2880),
        "block.0.attn.qkv.weight": (5120, 2880),
        "block.23.mlp.mlp1_weight.blocks": (32, 5760, 90, 16),
        "block.23.mlp.mlp2_weight.scales": (32, 2880, 90),
        "block.23.mlp.gate.bias": (32,),
    }
    assert {n: found[n] for n in expected} == expected


@pytest.mark.parametrize("tied", [False, True])
def test_native_names_are_the_parameters_of_the_model(tied):
    config = preset("tiny", tie_word_embeddings=tied, num_experts=(10, 8, 5, 6))
    with torch.device("meta"):
        model = Transformer(config)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == native_shapes(config)
    for layout in LAYOUTS.values():
        assert sorted(rule.native for rule in layout.rules(config)) == sorted(native_shapes(config))


@pytest.mark.parametrize("layout", ["native", "hf-bf16"])
def test_every_rule_goes_both_ways(layout):
    config = preset("tiny")
    for rule in LAYOUTS[layout].rules(config):
        value = torch.randn(native_shapes(config)[rule.native])
        stored = from_native(rule, config, value)
        assert {n: tuple(t.shape) for n, t in stored.items()} == stored_shapes(rule, config, tuple(value.shape))
        assert torch.equal(to_native(rule, list(stored.values())), value)


def test_detection():
    config = preset("tiny")
    for name, layout in LAYOUTS.items():
        names = [n for rule in layout.rules(config) for n in rule.foreign]
        assert detect(names).name == name
    with pytest.raises(CheckpointError, match="another architecture"):
        detect(["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"])


def test_mismatch_lists_everything_at_once():
    expected = {"layers.0.sinks": (4,), "norm.weight": (8,), "head": (3, 8)}
    assert mismatch(expected, dict(expected)) is None
    text = mismatch(expected, {"layers.0.sink": (4,), "head": (8, 3), "norm.weight": (8,), "x": (1,)})
    assert text == (
        "1 missing: layers.0.sinks (near layers.0.sink); 2 left over: layers.0.sink (near layers.0.sinks), x; "
        "1 of another shape: head [8, 3] instead of [3, 8]"
    )
