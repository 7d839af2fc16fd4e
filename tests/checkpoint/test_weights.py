"""What save writes load reads, whole or layer by layer, and a save that fails leaves what was there."""

import subprocess
import sys

import pytest
import torch

from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.weights import convert, load, load_ends, save, stream_layers
from xmoe.errors import ConfigError
from xmoe.kernels import memory
from xmoe.model.config import preset
from xmoe.quantization.packed import PackedWeight


@torch.no_grad()
def test_weights_in_huge_pages_are_the_same(published, monkeypatch):
    monkeypatch.setattr(memory, "HUGE", 4096)  # so that small weights are moved, too
    folder, tokens = published("openai"), torch.randint(160, (1, 9), generator=torch.Generator().manual_seed(1))
    mapped, moved = (load(folder, huge_pages=h)[0] for h in (False, True))
    theirs = mapped.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in moved.state_dict().items())
    assert torch.equal(moved(tokens).logits, mapped(tokens).logits)


def test_packed_experts_stay_packed(published, everything, same_bytes):
    folder = published("hf-mxfp4")
    model, tokenizer = load(folder)
    assert tokenizer is None and not model.training
    gate_up = model.blocks[2].moe.experts.gate_up
    assert isinstance(gate_up, PackedWeight) and gate_up.shape == (8, 192, 64)
    stored = everything(folder)
    assert torch.equal(gate_up.blocks, stored["model.layers.2.mlp.experts.gate_up_proj_blocks"])
    assert model.blocks[1].attn.qkv.weight.dtype == torch.bfloat16
    assert load(folder, dtype="float32")[0].blocks[1].attn.qkv.weight.dtype == torch.float32
    same_bytes(model.state_dict(), load(published("openai"))[0].state_dict())


def test_save_writes_what_load_reads(random_model, tmp_path, everything, same_bytes):
    config = preset("tiny", tie_word_embeddings=True)
    model = random_model(config)
    model.blocks[1].moe.router.selection_bias = torch.randn(10)
    save(model, tmp_path / "m", extra={"note": [1, 2]})
    again, _ = load(tmp_path / "m")
    assert again.config == config and again.source.extra == {"note": [1, 2]}
    same_bytes(model.state_dict(), again.state_dict())
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
def test_integer_experts_in_the_native_layout(random_model, tmp_path, format, options, everything, same_bytes):
    model = random_model(preset("tiny", hidden_size=64, intermediate_size=96))
    experts = model.blocks[2].moe.experts
    experts.pack("down", PackedWeight.encode(experts.down, format, **options))
    save(model, tmp_path / "m")
    assert Checkpoint(tmp_path / "m").formats == ["dense", format]
    again, _ = load(tmp_path / "m")
    same_bytes(model.state_dict(), again.state_dict())
    converted = convert(tmp_path / "m", tmp_path / "n", "native")
    same_bytes(everything(tmp_path / "m"), everything(converted))
    dense, _ = load(tmp_path / "m", experts="dense")
    assert torch.equal(dense.blocks[2].moe.experts.down, experts.down.decode(dtype=torch.float32))
    save(model, tmp_path / "h", layout="hf-mxfp4")
    assert load(tmp_path / "h")[0].blocks[2].moe.experts.down.format == "mxfp4"


def test_layer_by_layer_equals_the_whole(published, same_bytes):
    folder = published("hf-mxfp4", num_hidden_layers=3)
    whole, _ = load(folder)
    blocks = list(stream_layers(folder))
    ends = load_ends(folder)
    assert len(blocks) == 3 and len(ends.blocks) == 0
    for i, block in enumerate(blocks):
        same_bytes(block.state_dict(), whole.blocks[i].state_dict())
    same_bytes(ends.state_dict(), {k: v for k, v in whole.state_dict().items() if not k.startswith("blocks.")})


def test_cpu_weights_are_views_and_never_write_back(published, everything, same_bytes):
    folder = published("hf-mxfp4")
    before = everything(folder)
    model, _ = load(folder)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    same_bytes(before, everything(folder))


def test_float16_is_refused_with_the_reason(published):
    for wrong in ("float16", torch.float16):
        with pytest.raises(ConfigError, match="overflows at 65,504"):
            load(published("hf-mxfp4") if wrong == "float16" else "anywhere", dtype=wrong)
    with pytest.raises(ConfigError, match="choose auto"):
        load("anywhere", dtype="int4")
    with pytest.raises(ConfigError, match="choose mxfp4"):
        load("anywhere", experts="int8")


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


def test_a_save_that_fails_leaves_the_old_one(random_model, tmp_path, monkeypatch, everything, same_bytes):
    model = random_model(preset("tiny"))
    save(model, tmp_path / "m")
    before = everything(tmp_path / "m")
    with pytest.raises(ConfigError, match="already exists"):
        save(model, tmp_path / "m")
    from xmoe.checkpoint.shard_writer import ShardWriter

    def full(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "append", full)
    with pytest.raises(OSError, match="No space"):
        save(model, tmp_path / "m", overwrite=True)
    same_bytes(before, everything(tmp_path / "m"))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_packed_experts_go_into_kernel_order_on_cuda_and_nowhere_else(
    random_model, tmp_path, monkeypatch, everything, same_bytes
):
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
