"""config.json as it is written: both published files byte for byte, and what a layout cannot say."""

import dataclasses
import hashlib
import json

import pytest

from xmoe.checkpoint.config_reading import to_model_config
from xmoe.checkpoint.config_writing import check_expressible, config_text, generation_text
from xmoe.checkpoint.layouts import LAYOUTS
from xmoe.errors import ConfigError
from xmoe.model.config import FULL, PRESETS, SLIDING, preset


@pytest.mark.parametrize(
    ("name", "size", "sha256"),
    [
        ("gpt_oss_20b", 1806, "3a2a26ded679375b7928ddeca59764df7cea83220c1961035f6d6e232659e9ce"),
        ("gpt_oss_120b", 2089, "933aeb666a3fd851133ddd7686414f369bc564c4185fb5704416550879f10566"),
    ],
)
def test_the_published_files(read, name, size, sha256):
    config = preset(name)
    text = config_text(config, LAYOUTS["hf-mxfp4"]).encode()
    assert len(text) == size
    assert hashlib.sha256(text).hexdigest() == sha256
    again, extra = read(json.loads(text))
    assert again == config
    assert config_text(again, LAYOUTS["hf-mxfp4"], extra).encode() == text


def test_the_published_generation_config():
    text = generation_text(preset("gpt_oss_20b"))
    assert len(text) == 177
    assert json.loads(text)["eos_token_id"] == [200002, 199999, 200012]
    assert generation_text(preset("tiny")) is None
    assert json.loads(generation_text(preset("tiny"), {"eos_token_id": 7}))["eos_token_id"] == 7


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_preset_through_every_layout(name, layout):
    config = preset(name)
    if layout != "native":
        config = dataclasses.replace(config, tie_word_embeddings=False)
        if layout == "openai":  # it has no words for these two
            config = dataclasses.replace(config, reasoning_effort=None, initializer_range=0.02)
    content = json.loads(config_text(config, LAYOUTS[layout], {"kept": [1]}))
    layers = config.num_hidden_layers
    again, extra = to_model_config(content, [config.num_experts] * layers, "config.json")
    assert again == config
    assert extra["kept"] == [1]


def test_what_a_layout_cannot_say():
    openai = LAYOUTS["openai"]
    for changes in ({"rms_norm_eps": 1e-6}, {"layer_types": (FULL, SLIDING) * 2}):
        with pytest.raises(ConfigError, match="openai layout fixes"):
            check_expressible(preset("tiny", **changes), openai)
    with pytest.raises(ConfigError, match="max_position_embeddings is 500"):
        check_expressible(preset("tiny", max_position_embeddings=500), openai)
    with pytest.raises(ConfigError, match="multiple of 32"):
        check_expressible(preset("tiny", intermediate_size=80), LAYOUTS["hf-mxfp4"])
