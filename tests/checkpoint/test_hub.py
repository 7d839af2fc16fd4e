"""A folder is itself; a hub name goes through huggingface_hub, and a failure says what is missing."""

import sys
import types

import pytest

from xmoe.checkpoint.hub import local_folder
from xmoe.errors import CheckpointError


def test_a_folder_is_itself(tmp_path, monkeypatch):
    assert local_folder(tmp_path) == tmp_path
    assert local_folder(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert str(local_folder("org/name")) == "org/name"  # a folder wins over a hub name


def test_what_is_neither(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; expected the folder"):
        local_folder(tmp_path / "model.safetensors")
    for name in (tmp_path / "nothing", "just-a-word", "a/b/c"):
        with pytest.raises(CheckpointError, match="expected a checkpoint folder or a hub name"):
            local_folder(name)


def test_offline_says_what_is_missing(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="not in the hub cache, and HF_HUB_OFFLINE is set") as caught:
        local_folder("nobody/nothing-of-the-kind")
    assert "\n" not in str(caught.value)


def test_only_the_root_folder_is_downloaded(monkeypatch, tmp_path):
    """The published repositories hold the same weights three times."""
    pytest.importorskip("huggingface_hub")
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def snapshot_download(name, **options):
        asked[name] = options
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert local_folder("openai/gpt-oss-20b") == tmp_path
    files = [
        "config.json", "model-00000-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "chat_template.jinja", "LICENSE", "README.md", "original/model.safetensors", "metal/model.bin", "x.bin",
    ]  # fmt: skip
    assert list(filter_repo_objects(files, **asked["openai/gpt-oss-20b"])) == files[:6]


def test_network_and_permission_failures(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")

    def fail_with(error):
        def snapshot_download(name, **options):
            raise error

        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
        with pytest.raises(CheckpointError) as caught:
            local_folder("org/name")
        return str(caught.value)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "the hub cannot be reached (ConnectionError)" in fail_with(ConnectionError("no route"))
    response = types.SimpleNamespace(headers={}, status_code=404, request=None)
    assert "no repository of that name" in fail_with(errors.RepositoryNotFoundError("x", response=response))
    assert "asks for consent" in fail_with(errors.GatedRepoError("x", response=response))


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        local_folder("org/name")
