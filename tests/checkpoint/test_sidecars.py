"""The small files beside the weights come along, and an export says where generation ends."""

import json

import pytest
from tokenizers import AddedToken

from xmoe.checkpoint.weights import convert, load, save
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import CheckpointError
from xmoe.model.config import preset


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


def test_a_tokenizer_beyond_the_vocabulary(published):
    folder = published("hf-mxfp4")
    Tokenizer.of_bytes().save(folder)
    with pytest.raises(CheckpointError, match="vocabulary ends at 159"):
        load(folder)


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
