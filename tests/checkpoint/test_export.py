"""Every layout in and out, byte for byte."""

import json

import pytest
import torch
from safetensors import safe_open

from xmoe.checkpoint.weights import convert, load, save
from xmoe.errors import ConfigError
from xmoe.model.config import preset

PUBLISHED = ("hf-mxfp4", "hf-bf16", "openai")


def test_three_layouts_give_identical_tensors(published, same_bytes):
    states = [load(published(layout), experts="dense", dtype="bfloat16")[0].state_dict() for layout in PUBLISHED]
    assert len(states[0]) == 3 + 13 * 4
    same_bytes(states[0], states[1])
    same_bytes(states[0], states[2])


@pytest.mark.parametrize("layout", ["openai", "native"])
def test_there_and_back_reproduces_every_byte(published, tmp_path, layout, everything, same_bytes):
    folder = published("hf-mxfp4")
    there = convert(folder, tmp_path / "there", layout)
    back = convert(there, tmp_path / "back", "hf-mxfp4")
    same_bytes(everything(folder), everything(back))
    ours, original = (json.loads((f / "config.json").read_text()) for f in (back, folder))
    assert {k: ours[k] for k in original if k != "quantization_config"} == {
        k: v for k, v in original.items() if k != "quantization_config"
    }


def test_openai_export_has_the_published_names(published, tmp_path, everything, same_bytes):
    converted = convert(published("hf-mxfp4"), tmp_path / "c", "openai")
    same_bytes(everything(published("openai")), everything(converted))
    labels = json.loads((converted / "dtypes.json").read_text())
    assert labels["block.0.mlp.mlp1_weight.blocks"] == "FP4" and labels["block.0.mlp.mlp1_weight.scales"] == "UE8"
    assert labels.keys() == everything(converted).keys() and labels["norm.scale"] == "BF16"


def test_dense_export_is_the_dequantized_model(published, tmp_path, everything, same_bytes):
    converted = convert(published("hf-mxfp4"), tmp_path / "b", "hf-bf16")
    same_bytes(everything(published("hf-bf16")), everything(converted))
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())


def test_dense_values_survive_packing(published, tmp_path):
    """b -> a: bytes may differ (a smaller scale, a negative zero), values may not."""
    folder = published("hf-bf16")
    packed = convert(folder, tmp_path / "a", "hf-mxfp4")
    for name, tensor in load(packed, experts="dense")[0].state_dict().items():
        assert torch.equal(tensor, load(folder)[0].state_dict()[name]), name


def test_exports_untie_embeddings(random_model, tmp_path):
    model = random_model(preset("tiny", tie_word_embeddings=True)).bfloat16()
    save(model, tmp_path / "h", layout="hf-bf16")
    again, _ = load(tmp_path / "h")
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.head.weight, model.embed.weight)


def test_uneven_experts_are_native_only(random_model, tmp_path):
    config = preset("tiny", num_experts=(10, 7, 5, 9))
    model = random_model(config)
    save(model, tmp_path / "m")
    assert load(tmp_path / "m")[0].config == config
    for layout in PUBLISHED:
        with pytest.raises(ConfigError, match="5 to 10 experts"):
            save(model, tmp_path / "x", layout=layout)
        with pytest.raises(ConfigError, match="5 to 10 experts"):
            convert(tmp_path / "m", tmp_path / "x", layout)
    assert not (tmp_path / "x").exists()


def test_files_carry_the_metadata_transformers_wants(random_model, tmp_path):
    save(random_model(preset("tiny")), tmp_path / "m", layout="hf-mxfp4")
    with safe_open(tmp_path / "m/model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
