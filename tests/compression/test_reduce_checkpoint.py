"""Layer by layer from disk: the bytes, and the report, of the reduction of the whole model in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xmoe.checkpoint.weights import load, save
from xmoe.compression import reduce_checkpoint as module
from xmoe.compression.changed import save_changed
from xmoe.compression.reduce import reduce
from xmoe.compression.reduce_checkpoint import operations, reduce_checkpoint
from xmoe.compression.routing import record_routing
from xmoe.errors import ConfigError, DataError

JOBS = {
    "packed": (["int8"], None, {}),
    "zeros": (["magnitude", "int4"], 0.4, {"group_size": 32}),
    "wanda and back": (["magnitude", "neurons", "mxfp4"], 0.3, {"score": "wanda"}),
    "factors": (["low-rank", "neurons", "int8"], 0.3, {"whiten": True}),
    "twice fitted": (["low-rank", "magnitude", "low-rank"], 0.3, {"whiten": True, "score": "moe-pruner"}),
    "some": (["low-rank", "int8"], 0.4, {"experts": [(0, 3), (2, 1), (2, 6)]}),
    "a pattern": (["magnitude"], None, {"pattern": (2, 4), "scope": "global"}),
    "all layers at once": (["magnitude"], 0.3, {"scope": "global"}),
}


def contents(folder) -> dict[str, bytes]:
    """All files but the manifest, which has the time."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}


def looks(name: str) -> bool:
    """Whether the job asks what experts are fed."""
    return bool({"whiten", "score"} & set(JOBS[name][2]))


@pytest.mark.parametrize(
    ("name", "given"), [(n, g) for n in JOBS for g in ("text", "sample", "nothing") if g != "nothing" or not looks(n)]
)
@torch.no_grad()
def test_bytes_and_report_are_those_of_the_whole_model(checkpoint, tokens, tmp_path, monkeypatch, name, given):
    methods, fraction, options = JOBS[name]
    source = checkpoint("native", num_experts_per_tok=2)
    model, _ = load(source)
    padded = torch.cat((tokens, torch.zeros(6, 3, dtype=torch.int64)), dim=1)
    text = [(padded[:4], torch.arange(14).expand(4, 14) < 11), tokens[4:]]
    inputs = {
        "text": {"batches": text},
        "sample": {"stats": record_routing(model, [tokens], sample=50)},
        "nothing": {},
    }[given]
    small, stages = reduce(model, methods, fraction, **inputs, **options)
    save_changed(small, source, tmp_path / "whole", operations(stages, fraction))
    if "all layers" not in name:
        monkeypatch.setattr(module, "load", lambda *_: 1 / 0)  # nothing of the kind is needed
    found = reduce_checkpoint(source, tmp_path / "layers", methods, fraction, **inputs, **options)
    assert len(found) == len(stages)
    for a, b in zip(found, stages):
        assert a[:6] == b[:6] and a.detail == b.detail
        for mine, theirs in zip(a[6:8], b[6:8]):
            assert mine == (None if theirs is None else pytest.approx(theirs, rel=1e-4, abs=1e-9))
    mine, theirs = contents(tmp_path / "layers"), contents(tmp_path / "whole")
    assert mine.keys() == theirs.keys()
    if looks(name) and given == "text" and len(methods) > 1:  # the same values, summed in another order
        a, b = load(tmp_path / "layers")[0], load(tmp_path / "whole")[0]
        torch.testing.assert_close(a(tokens).logits, b(tokens).logits, rtol=0.02, atol=0.02)
    else:
        assert mine == theirs
    assert sorted(p.name for p in tmp_path.iterdir()) == ["layers", "source", "source-whole", "whole"]


@pytest.mark.parametrize("layout", ["hf-mxfp4", "hf-bf16", "openai"])
@torch.no_grad()
def test_published_layouts_and_other_types(checkpoint, random_model, config, tmp_path, layout):
    source = checkpoint(layout)
    for methods, dtype in ((["magnitude"], "auto"), (["neurons", "low-rank"], "float32")):
        model, _ = load(source, dtype=dtype)
        small, stages = reduce(model, methods, 0.5)
        out = tmp_path / f"{methods[0]}"
        save_changed(small, source, tmp_path / f"{out.name}-whole", operations(stages, 0.5))
        assert reduce_checkpoint(source, out, methods, 0.5, dtype=dtype) == stages
        assert contents(out) == contents(tmp_path / f"{out.name}-whole")


@torch.no_grad()
def test_a_source_of_several_forms_and_a_balancing_bias(random_model, config, tmp_path):
    model = random_model(config(num_experts=(7, 5, 6)))
    model.blocks[1].moe.router.selection_bias = torch.arange(5.0)
    model, _ = reduce(model, ["int8"], experts=[(0, 2), (1, 0)])
    save(model, tmp_path / "source")
    for methods in (["low-rank", "int8"], ["neurons"]):
        out = tmp_path / methods[0]
        small, stages = reduce(load(tmp_path / "source")[0], methods, 0.3)
        save_changed(small, tmp_path / "source", tmp_path / f"{out.name}-whole", operations(stages, 0.3))
        assert reduce_checkpoint(tmp_path / "source", out, methods, 0.3) == stages
        assert contents(out) == contents(tmp_path / f"{out.name}-whole")
    assert load(tmp_path / "low-rank")[0].blocks[1].moe.router.selection_bias.tolist() == [0, 1, 2, 3, 4]


def test_mistakes_leave_nothing(checkpoint, random_model, config, tokens, tmp_path, monkeypatch):
    source = checkpoint("hf-mxfp4")
    before = sorted(p.name for p in tmp_path.iterdir())

    def refused(message, *args, error=ConfigError, **options):
        with pytest.raises(error, match=message):
            reduce_checkpoint(source, tmp_path / "out", *args, **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == before

    refused("unknown method 'svd'", ["svd"])
    refused("saves nothing", ["low-rank"], rank=(90, 90))
    refused("no such expert", ["int8"], experts=[(0, 7)])
    refused("looks at what experts are fed", ["low-rank"], 0.5, whiten=True)
    refused("int4 groups of 128 do not divide", ["int4"], group_size=128)
    other = record_routing(random_model(config(), 3), [tokens], sample=8)
    refused("statistics are of model", ["int8"], stats=other, error=DataError)

    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / ".out.abc.partial" / "0"))

    monkeypatch.setattr(module.ShardWriter, "append", full)
    refused("No space left on device", ["int8"], error=OSError)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigError, match="already exists"):
        reduce_checkpoint(source, tmp_path / "out", ["int8"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of one process is read as Linux tells it")
def test_memory_is_that_of_a_layer(random_model, config, tmp_path):
    """Layers of 6.3 MB each: twelve of them take no more than two, where one model in memory takes 63 MB more."""
    peaks = []
    for layers in (2, 12):
        shape = {
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_experts": 8,
            "num_hidden_layers": layers,
            "vocab_size": 40,
        }
        folder = save(random_model(config(**shape)), tmp_path / f"{layers}")
        script = (
            "from xmoe.compression.reduce_checkpoint import reduce_checkpoint\n"
            f"reduce_checkpoint({str(folder)!r}, {str(tmp_path / f'{layers}-out')!r}, ['magnitude', 'int8'], 0.5)\n"
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 20
