"""What cannot be opened says why in one line: tensors and config.json that do not fit, and damaged files."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from xmoe.checkpoint.weights import load
from xmoe.errors import CheckpointError


@pytest.mark.parametrize("layout", ["hf-mxfp4", "hf-bf16", "openai"])
def test_config_that_contradicts_the_number_of_experts(published, edit_json, layout):
    folder = published(layout)
    key = "num_experts" if layout == "openai" else "num_local_experts"
    edit_json(folder / "config.json", **{key: 6})
    with pytest.raises(CheckpointError, match=r"6 experts in layer 0 .*8 rows"):
        load(folder)
    edit_json(folder / "config.json", **{key: 8, "num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match=r"3 layers.* for 4"):
        load(folder)


def test_config_that_contradicts_the_packing(published, edit_json):
    packed, dense = published("hf-mxfp4"), published("hf-bf16")
    edit_json(packed / "config.json", quantization_config=None)
    with pytest.raises(CheckpointError, match="quantization_config says None, but the experts are stored as MXFP4"):
        load(packed)
    edit_json(dense / "config.json", quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match="'mxfp4', but the experts are stored dense"):
        load(dense)


def test_dense_experts_under_packed_names(published, tmp_path, everything):
    """What transformers' save_pretrained leaves behind after dequantizing."""
    folder = published("hf-bf16")
    tensors = {n + "_blocks" * n.endswith("_proj"): t for n, t in everything(folder).items()}
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"quantization_config says None"):
        load(folder)
    content = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"8 missing.*of another shape.*save_pretrained leaves behind"):
        load(folder)


def test_a_nan_scale(published):
    folder = published("hf-mxfp4")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        name = next((n for n in tensors if n == "model.layers.1.mlp.experts.down_proj_scales"), None)
        if name:
            tensors[name][3, 2, 1] = 255
            save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.moe\.experts\.down: 1 scale byte is 255"):
        load(folder)


def test_missing_left_over_and_misshaped_are_listed_together(published, everything):
    folder = published("hf-bf16")
    tensors = everything(folder)
    for file in folder.glob("model*"):
        file.unlink()
    tensors["model.layers.0.self_attn.sink"] = tensors.pop("model.layers.0.self_attn.sinks")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()
    tensors["rotary.inv_freq"] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    text = str(caught.value)
    assert "1 missing: model.layers.0.self_attn.sinks (near model.layers.0.self_attn.sink)" in text
    assert "2 left over" in text and "rotary.inv_freq" in text
    assert "1 of another shape: model.norm.weight [63] instead of [64]" in text
    assert "\n" not in text


def test_down_projection_that_was_not_transposed(published, everything):
    """Where both widths are equal only the table can tell; where they differ the shape does."""
    folder = published("hf-bf16")
    tensors = everything(folder)
    for file in folder.glob("model*"):
        file.unlink()
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"\[8, 64, 96\] instead of \[8, 96, 64\]"):
        load(folder)


def test_another_architecture(tmp_path, published, edit_json):
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"model.layers.0.mlp.gate_proj.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="'llama', a folder of another architecture"):
        load(folder)
    edit_json(folder / "config.json", model_type="gpt_oss")
    with pytest.raises(CheckpointError, match="weights of another architecture"):
        load(folder)
    with pytest.raises(CheckpointError, match="no folder"):
        load(tmp_path / "nowhere")


def test_a_folder_without_weights(tmp_path, published):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="has no weights"):
        load(empty)
    folder = published("hf-mxfp4")
    (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="has no config\\.json"):
        load(folder)
    (empty / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="has no weights"):
        load(empty)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz_a_header_that_stays_well_formed(published, data):
    """Dtypes, shapes and names changed so that the file itself is sound: the model must refuse it, or be the same."""
    folder = published("hf-mxfp4", num_hidden_layers=1, vocab_size=40, hidden_size=32, intermediate_size=32)
    file = sorted(folder.glob("*.safetensors"))[data.draw(st.integers(0, 2))]
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(n for n in header if n != "__metadata__")))
    entry = header[name]
    kind = data.draw(st.sampled_from(["dtype", "shape", "name"]))
    if kind == "dtype":
        same_size = {"BF16": ["F16", "I16"], "U8": ["I8", "BOOL"]}[entry["dtype"]]
        entry["dtype"] = data.draw(st.sampled_from(same_size))
    elif kind == "shape":
        entry["shape"] = data.draw(st.permutations([*entry["shape"], 1]))
    else:
        header[name + "x"] = header.pop(name)
    text = json.dumps(header).encode()
    replaced = file.with_suffix(".new")  # the old file may still be mapped; its bytes must stay where they are
    replaced.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    replaced.replace(file)
    try:
        load(folder)
        assert (
            kind == "dtype" and entry["dtype"] == "F16"
        )  # another float of the same width is another model, not a fault
    except CheckpointError as e:
        assert "\n" not in str(e)
    finally:
        replaced.write_bytes(raw)
        replaced.replace(file)
