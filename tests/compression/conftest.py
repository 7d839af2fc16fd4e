"""A small model with unequal dimensions, and text for it."""

from __future__ import annotations

import itertools

import pytest
import torch

from xmoe.checkpoint.layouts import LAYOUTS
from xmoe.checkpoint.opened import Checkpoint
from xmoe.checkpoint.shard_reader import ShardReader
from xmoe.checkpoint.shard_writer import ShardWriter
from xmoe.checkpoint.weights import load, save
from xmoe.model.config import ModelConfig
from xmoe.model.describe import describe
from xmoe.quantization import mxfp4
from xmoe.quantization.packed import PackedWeight

WEIGHTS = ("gate_up", "down")
SHAPE = {
    "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 10, "intermediate_size": 64, "num_experts": 7, "num_experts_per_tok": 3, "sliding_window": 5,
    "max_position_embeddings": 64, "initial_context_length": 16, "rope_scaling_factor": 4.0,
}  # fmt: skip


@pytest.fixture
def config():
    """changes -> a ModelConfig of three layers with seven experts, three a token."""
    return lambda **changes: ModelConfig(**{**SHAPE, **changes})


@pytest.fixture
def model(random_model, config):
    """A random model of :data:`SHAPE`."""
    return random_model(config())


@pytest.fixture
def tokens():
    """int64 [6, 11]"""
    return torch.randint(0, SHAPE["vocab_size"], (6, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def pack():
    """model -> the same model, its experts packed in MXFP4 (in place)."""

    def packed(model):
        for block in model.blocks:
            for name in ("gate_up", "down"):
                block.moe.experts.pack(name, PackedWeight.encode(getattr(block.moe.experts, name).data))
        return model

    return packed


@pytest.fixture
def checkpoint(tmp_path, random_model, config, pack):
    """layout, changes to the config -> a folder with a random model in several shards."""

    def written(layout: str, name: str = "source", seed: int = 0, **changes):
        model = random_model(config(**changes), seed)
        model = model.to(torch.bfloat16) if layout == "hf-bf16" else pack(model).to(torch.bfloat16)
        save(model, tmp_path / f"{name}-whole", layout)
        folder = tmp_path / name
        folder.mkdir()
        for file in (tmp_path / f"{name}-whole").iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        reader = ShardReader(tmp_path / f"{name}-whole")
        tensors = {n: (info.dtype, info.shape) for n, info in reader.tensors.items()}
        with ShardWriter(folder, tensors, max_shard_bytes=40_000, shard_name=LAYOUTS[layout].shard_name) as writer:
            for n in tensors:
                writer.copy_rows(n, reader, n)
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "LICENSE").write_text("Apache-2.0")
        return folder

    return written


@pytest.fixture
def check_file():
    """model, bytes of its expert weights, folder, tokens -> the Checkpoint written there.

    The model against its file: bytes, what the experts compute against the file's values in float64, and what comes back.
    """
    return _check_file


def stored(reader: ShardReader, name: str) -> torch.Tensor:
    """float64 [E, out, in] of a weight from the tensors of the file, read by the formats' definitions alone."""
    if name in reader:
        return reader.tensor(name).double()
    if f"{name}.part" in reader:
        part = reader.tensor(f"{name}.part").tolist()
        parts = {k: iter(stored(reader, f"{name}.{k}")) for k in sorted(set(part))}
        return torch.stack([next(parts[k]) for k in part])
    if any(n.startswith(f"{name}.left") for n in reader):
        return stored(reader, f"{name}.left") @ stored(reader, f"{name}.right")
    scales = reader.tensor(f"{name}.scales")
    if f"{name}.blocks" in reader:
        blocks = reader.tensor(f"{name}.blocks")
        nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).long()
        values = torch.tensor([*mxfp4.VALUES, *(-v for v in mxfp4.VALUES)], dtype=torch.float64)[nibbles]
        return (values * torch.exp2(scales.double() - 127).unsqueeze(-1)).flatten(-2)
    values = reader.tensor(f"{name}.values")
    if values.dtype == torch.uint8:
        values = torch.stack((values & 15, values >> 4), dim=-1).flatten(-2).double() - 8
    groups = values.double().unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales.double().unsqueeze(-1)).flatten(-2)


def mixture(gate_up, gate_up_bias, down, down_bias, limit, x, indices, weights) -> torch.Tensor:
    """What the experts make of x, token by token in float64."""
    y = torch.zeros(len(x), down.shape[1], dtype=torch.float64)
    for t, slot in itertools.product(range(len(x)), range(indices.shape[1])):
        e = int(indices[t, slot])
        if e < 0:
            continue
        hidden = gate_up[e] @ x[t].double() + gate_up_bias[e].double()
        gate, up = hidden[0::2].clamp(max=limit), hidden[1::2].clamp(-limit, limit)
        active = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        y[t] += weights[t, slot].double() * (down[e] @ active + down_bias[e].double())
    return y


def _check_file(small, expected_bytes, folder, tokens) -> Checkpoint:
    save(small, folder)
    reader = ShardReader(folder)
    names = [n for n in reader if any(f".experts.{w}." in n + "." for w in WEIGHTS)]
    assert expected_bytes == sum(reader[n].nbytes for n in names)
    g = torch.Generator().manual_seed(3)
    D, E = small.config.hidden_size, small.config.num_experts
    x, weights = torch.randn(9, D, generator=g), torch.rand(9, 2, generator=g)
    indices = torch.randint(-1, E, (9, 2), generator=g)
    for i, block in enumerate(small.blocks):
        experts, at = block.moe.experts, f"blocks.{i}.moe.experts"
        held = [stored(reader, f"{at}.{w}") for w in WEIGHTS]
        wanted = mixture(held[0], experts.gate_up_bias, held[1], experts.down_bias, experts.limit, x, indices, weights)
        with torch.no_grad():
            found = experts(x, indices, weights)[0].double()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    back, _ = load(folder)
    assert describe(back)[:-1] == describe(small)[:-1]
    for (name, a), (other, b) in zip(
        sorted(small.state_dict().items()), sorted(back.state_dict().items()), strict=True
    ):
        assert name == other and torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, small(tokens).logits)
    opened = Checkpoint(folder)
    assert opened.parameter_counts[0] == describe(small).parameters
    return opened
