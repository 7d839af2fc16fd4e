"""Every layout in and out, byte for byte; what cannot be opened says why in one line."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.weights import convert, load, load_ends, save, stream_layers
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import CheckpointError, ConfigError
from xmoe.kernels import memory
from xmoe.model.config import preset
from xmoe.quantization.packed import PackedWeight

PUBLISHED = ("hf-mxfp4", "hf-bf16", "openai")


def everything(folder) -> dict:
    """All tensors of a folder, read by the safetensors library alone."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_bytes(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)), name


def state(model) -> dict:
    return dict(model.state_dict())


def test_three_layouts_give_identical_tensors(published):
    states = [state(load(published(layout), experts="dense", dtype="bfloat16")[0]) for layout in PUBLISHED]
    assert len(states[0]) == 3 + 13 * 4
    same_bytes(states[0], states[1])
    same_bytes(states[0], states[2])


@torch.no_grad()
def test_weights_in_huge_pages_are_the_same(published, monkeypatch):
    monkeypatch.setattr(memory, "HUGE", 4096)  # so that small weights are moved, too
    folder, tokens = published("openai"), torch.randint(160, (1, 9), generator=torch.Generator().manual_seed(1))
    mapped, moved = (load(folder, huge_pages=h)[0] for h in (False, True))
    theirs = mapped.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in moved.state_dict().items())
    assert torch.equal(moved(tokens).logits, mapped(tokens).logits)


def test_packed_experts_stay_packed(published):
    folder = published("hf-mxfp4")
    model, tokenizer = load(folder)
    assert tokenizer is None and not model.training
    gate_up = model.blocks[2].moe.experts.gate_up
    assert isinstance(gate_up, PackedWeight) and gate_up.shape == (8, 192, 64)
    stored = everything(folder)
    assert torch.equal(gate_up.blocks, stored["model.layers.2.mlp.experts.gate_up_proj_blocks"])
    assert model.blocks[1].attn.qkv.weight.dtype == torch.bfloat16
    assert load(folder, dtype="float32")[0].blocks[1].attn.qkv.weight.dtype == torch.float32
    same_bytes(state(model), state(load(published("openai"))[0]))


@pytest.mark.parametrize("layout", ["openai", "native"])
def test_there_and_back_reproduces_every_byte(published, tmp_path, layout):
    folder = published("hf-mxfp4")
    there = convert(folder, tmp_path / "there", layout)
    back = convert(there, tmp_path / "back", "hf-mxfp4")
    same_bytes(everything(folder), everything(back))
    ours, original = (json.loads((f / "config.json").read_text()) for f in (back, folder))
    assert {k: ours[k] for k in original if k != "quantization_config"} == {
        k: v for k, v in original.items() if k != "quantization_config"
    }


def test_openai_export_has_the_published_names(published, tmp_path):
    converted = convert(published("hf-mxfp4"), tmp_path / "c", "openai")
    same_bytes(everything(published("openai")), everything(converted))
    labels = json.loads((converted / "dtypes.json").read_text())
    assert labels["block.0.mlp.mlp1_weight.blocks"] == "FP4" and labels["block.0.mlp.mlp1_weight.scales"] == "UE8"
    assert labels.keys() == everything(converted).keys() and labels["norm.scale"] == "BF16"


def test_dense_export_is_the_dequantized_model(published, tmp_path):
    converted = convert(published("hf-mxfp4"), tmp_path / "b", "hf-bf16")
    same_bytes(everything(published("hf-bf16")), everything(converted))
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())


def test_dense_values_survive_packing(published, tmp_path):
    """b -> a: bytes may differ (a smaller scale, a negative zero), values may not."""
    folder = published("hf-bf16")
    packed = convert(folder, tmp_path / "a", "hf-mxfp4")
    for name, tensor in state(load(packed, experts="dense")[0]).items():
        assert torch.equal(tensor, state(load(folder)[0])[name]), name


def test_save_writes_what_load_reads(random_model, tmp_path):
    config = preset("tiny", tie_word_embeddings=True)
    model = random_model(config)
    model.blocks[1].moe.router.selection_bias = torch.randn(10)
    save(model, tmp_path / "m", extra={"note": [1, 2]})
    again, _ = load(tmp_path / "m")
    assert again.config == config and again.source.extra == {"note": [1, 2]}
    same_bytes(state(model), state(again))
    assert torch.equal(again.blocks[1].moe.router.selection_bias, model.blocks[1].moe.router.selection_bias)
    assert again.blocks[0].moe.router.selection_bias is None
    convert(tmp_path / "m", tmp_path / "converted", "native")
    same_bytes(everything(tmp_path / "m"), everything(tmp_path / "converted"))
    tokens = torch.arange(40).view(1, 40)
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    with pytest.raises(ConfigError, match="balancing bias"):
        save(again, tmp_path / "h", layout="hf-bf16")


@pytest.mark.parametrize(
    ("format", "options"), [("int8", {}), ("int8", {"affine": True}), ("int4", {"group_size": 32})]
)
def test_integer_experts_in_the_native_layout(random_model, tmp_path, format, options):
    model = random_model(preset("tiny", hidden_size=64, intermediate_size=96))
    experts = model.blocks[2].moe.experts
    experts.pack("down", PackedWeight.encode(experts.down, format, **options))
    save(model, tmp_path / "m")
    assert Checkpoint(tmp_path / "m").formats == ["dense", format]
    again, _ = load(tmp_path / "m")
    same_bytes(state(model), state(again))
    converted = convert(tmp_path / "m", tmp_path / "n", "native")
    same_bytes(everything(tmp_path / "m"), everything(converted))
    dense, _ = load(tmp_path / "m", experts="dense")
    assert torch.equal(dense.blocks[2].moe.experts.down, experts.down.decode(dtype=torch.float32))
    save(model, tmp_path / "h", layout="hf-mxfp4")
    assert load(tmp_path / "h")[0].blocks[2].moe.experts.down.format == "mxfp4"


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


def test_layer_by_layer_equals_the_whole(published):
    folder = published("hf-mxfp4", num_hidden_layers=3)
    whole, _ = load(folder)
    blocks = list(stream_layers(folder))
    ends = load_ends(folder)
    assert len(blocks) == 3 and len(ends.blocks) == 0
    for i, block in enumerate(blocks):
        same_bytes(state(block), state(whole.blocks[i]))
    same_bytes(state(ends), {k: v for k, v in state(whole).items() if not k.startswith("blocks.")})


def test_cpu_weights_are_views_and_never_write_back(published):
    folder = published("hf-mxfp4")
    before = everything(folder)
    model, _ = load(folder)
    with torch.no_grad():
        for tensor in state(model).values():
            tensor.zero_()
    same_bytes(before, everything(folder))


def test_small_files_come_along(published, tmp_path):
    folder = published("hf-mxfp4", vocab_size=272)
    tokenizer = Tokenizer.of_bytes()
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    (folder / "LICENSE").write_text("terms")
    (folder / "secret.py").write_text("not ours")
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 3, "made_by": "someone"}
    (folder / "config.json").write_text(json.dumps(config))
    model, loaded = load(folder)
    assert loaded.fingerprint == tokenizer.fingerprint
    save(model, tmp_path / "saved", layout="hf-bf16", tokenizer=loaded)
    convert(folder, tmp_path / "converted", "native")
    for goal in (tmp_path / "saved", tmp_path / "converted"):
        for name in ("chat_template.jinja", "generation_config.json", "LICENSE", "tokenizer.json"):
            assert (goal / name).read_bytes() == (folder / name).read_bytes(), name
        content = json.loads((goal / "config.json").read_text())
        assert content["eos_token_id"] == 3 and content["made_by"] == "someone"
        assert not (goal / "secret.py").exists()


def test_a_trained_variant_exports_with_its_stop_token(random_model, tmp_path):
    tokenizer = Tokenizer.of_bytes()
    save(random_model(preset("tiny")), tmp_path / "h", layout="hf-bf16", tokenizer=tokenizer)
    assert json.loads((tmp_path / "h/config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    assert json.loads((tmp_path / "h/generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    assert json.loads((tmp_path / "h/tokenizer_config.json").read_text())["eos_token"]


def test_a_harmony_vocabulary_is_exported_with_the_tokens_of_the_published_one(random_model, tmp_path):
    """What readers take from tokenizer_config.json: an answer ends with <|return|>, and decoding gives back the text."""
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.of_bytes()
    names = ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|start|>", "<|end|>"]
    tokenizer.backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer = Tokenizer(tokenizer.backend)
    save(random_model(preset("tiny")), tmp_path / "h", layout="hf-mxfp4", tokenizer=tokenizer)
    read = AutoTokenizer.from_pretrained(tmp_path / "h")
    assert (read.bos_token, read.eos_token, read.pad_token) == ("<|startoftext|>", "<|return|>", "<|endoftext|>")
    text = "Isn ' t it ?  no , I ' m ."
    ids = read.encode(text, add_special_tokens=False)
    assert ids == tokenizer.encode(text) and read.decode(ids) == text


# ------------------------------------------------------------------------------------------------------ bad input


def test_float16_is_refused_with_the_reason(published):
    for wrong in ("float16", torch.float16):
        with pytest.raises(ConfigError, match="overflows at 65,504"):
            load(published("hf-mxfp4") if wrong == "float16" else "anywhere", dtype=wrong)
    with pytest.raises(ConfigError, match="choose auto"):
        load("anywhere", dtype="int4")
    with pytest.raises(ConfigError, match="choose mxfp4"):
        load("anywhere", experts="int8")


@pytest.mark.parametrize("layout", PUBLISHED)
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


def test_dense_experts_under_packed_names(published, tmp_path):
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


def test_missing_left_over_and_misshaped_are_listed_together(published):
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


def test_down_projection_that_was_not_transposed(published):
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


def test_a_tokenizer_beyond_the_vocabulary(published):
    folder = published("hf-mxfp4")
    Tokenizer.of_bytes().save(folder)
    with pytest.raises(CheckpointError, match="vocabulary ends at 159"):
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


def test_the_original_folder_finds_its_tokenizer_one_floor_up(published, tmp_path):
    root = tmp_path / "gpt-oss"
    root.mkdir()
    published("openai", vocab_size=272).rename(root / "original")
    Tokenizer.of_bytes().save(root)
    (root / "chat_template.jinja").write_text("{{ messages }}")
    assert load(root / "original")[1].vocab_size == Tokenizer.of_bytes().vocab_size
    converted = convert(root / "original", tmp_path / "converted", "hf-mxfp4")
    assert (converted / "chat_template.jinja").exists() and load(converted)[1] is not None
    with pytest.raises(CheckpointError, match="original, pass that folder"):
        (root / "config.json").write_bytes((converted / "config.json").read_bytes())
        load(root)


def test_what_a_checkpoint_cannot_hold(random_model, tmp_path):
    model = random_model(preset("tiny"))
    with pytest.raises(ConfigError, match="choose native, hf-mxfp4, hf-bf16, openai"):
        save(model, tmp_path / "m", layout="gguf")
    model.blocks[2].moe.router.keep_only([0, 1, 2, 3])
    with pytest.raises(ConfigError, match="layer 2 has a pruning plan on trial"):
        save(model, tmp_path / "m")
    model.blocks[2].moe.router.keep_only(None)
    model.blocks[0].attn.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="merge adapters first"):
        save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_save_that_fails_leaves_the_old_one(random_model, tmp_path, monkeypatch):
    model = random_model(preset("tiny"))
    save(model, tmp_path / "m")
    before = everything(tmp_path / "m")
    with pytest.raises(ConfigError, match="already exists"):
        save(model, tmp_path / "m")
    from xmoe.checkpoint.shards import ShardWriter

    def full(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "append", full)
    with pytest.raises(OSError, match="No space"):
        save(model, tmp_path / "m", overwrite=True)
    same_bytes(before, everything(tmp_path / "m"))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_files_carry_the_metadata_transformers_wants(random_model, tmp_path):
    save(random_model(preset("tiny")), tmp_path / "m", layout="hf-mxfp4")
    with safe_open(tmp_path / "m/model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_packed_experts_go_into_kernel_order_on_cuda_and_nowhere_else(random_model, tmp_path, monkeypatch):
    """With a pretended CUDA device: at loading, in place, so that no second copy is made at first use."""
    from xmoe.checkpoint import weights
    from xmoe.kernels.cuda import backend
    from xmoe.kernels.cuda.repack import RepackedWeight

    folder = save(random_model(preset("tiny")), tmp_path / "m", layout="hf-mxfp4")
    model, _ = load(folder)
    values = model.blocks[1].moe.experts.down.decode()
    assert not any(isinstance(m, RepackedWeight) for m in model.modules())
    monkeypatch.setattr(backend, "reason", lambda device, dtype: "the Triton kernels are not there")
    weights._prepare(model, torch.device("cuda", 0))
    assert not any(isinstance(m, RepackedWeight) for m in model.modules())
    monkeypatch.setattr(backend, "reason", lambda device, dtype: None)
    weights._prepare(model, torch.device("cpu"))
    assert not any(isinstance(m, RepackedWeight) for m in model.modules())
    weights._prepare(model, torch.device("cuda", 0))
    for block in model.blocks:
        assert isinstance(block.moe.experts.gate_up, RepackedWeight) and block.moe.experts.gate_up.paired
        assert isinstance(block.moe.experts.down, RepackedWeight) and not block.moe.experts.down.paired
    assert torch.equal(model.blocks[1].moe.experts.down.decode(), values)
    save(model, tmp_path / "again", layout="hf-mxfp4")
    same_bytes(everything(folder), everything(tmp_path / "again"))


def test_loading_and_running_on_the_cpu_imports_no_triton(random_model, tmp_path):
    folder = save(random_model(preset("tiny")), tmp_path / "m", layout="hf-mxfp4")
    script = (
        f"import sys, torch, xmoe; model, _ = xmoe.load({str(folder)!r}); model(torch.ones(1, 3, dtype=torch.int64))\n"
        "print([m for m in sys.modules if m == 'triton' or m.startswith('xmoe.kernels.cuda.')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['xmoe.kernels.cuda.backend']"
