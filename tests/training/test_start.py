"""Where a run starts: the seed's weights, a checkpoint's, with adapters beside it or without, or those of a save."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from xmoe.checkpoint import train_state, weights
from xmoe.config import load_config
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import ConfigError
from xmoe.model.adapter import LoRA
from xmoe.model.config import preset
from xmoe.model.transformer import build
from xmoe.quantization.packed import PackedWeight
from xmoe.training import start
from xmoe.training.adapters import LoRAConfig
from xmoe.training.config import RunConfig, TrainConfig
from xmoe.training.trainer import train

SHAPE = preset("tiny", num_hidden_layers=2, num_experts=6, reasoning_effort=None)
CPU = torch.device("cpu")


@pytest.fixture
def packed(tmp_path) -> Path:
    """A checkpoint in MXFP4 with a tokenizer beside it."""
    return weights.save(build(SHAPE, seed=3), tmp_path / "packed", "hf-mxfp4", tokenizer=Tokenizer.of_bytes())


def begin(config: RunConfig, output: Path, step: int = 0, dtype: torch.dtype = torch.float32):
    return start.model(config, output, step, CPU, dtype)


def assert_same_weights(ours, theirs) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_checkpoint_the_seed_draws_the_weights_in_float32(tmp_path, dtype):
    config = RunConfig(model=SHAPE, train=TrainConfig(seed=5))
    assert start.tokenizer(config) is None
    model = begin(config, tmp_path, dtype=dtype)
    assert_same_weights(model, build(SHAPE, seed=5))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def test_a_packed_checkpoint_is_unpacked_to_be_trained(packed, tmp_path):
    config = RunConfig(train=TrainConfig(init_from=str(packed)))
    assert config.model == weights.load(packed)[0].config
    assert start.tokenizer(config).fingerprint == Tokenizer.of_bytes().fingerprint
    model = begin(config, tmp_path / "run", dtype=torch.bfloat16)
    assert_same_weights(model, weights.load(packed, dtype="float32", experts="dense")[0])
    assert model.source.folder == packed


@pytest.mark.parametrize("dtype, stored", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_beside_adapters_a_checkpoint_stays_as_it_is_stored(packed, tmp_path, dtype, stored):
    config = RunConfig(train=TrainConfig(init_from=str(packed)), lora=LoRAConfig(rank={"attention": 3}))
    model = begin(config, tmp_path / "run", dtype=dtype)
    assert isinstance(model.blocks[0].moe.experts.down, PackedWeight)
    assert isinstance(model.blocks[0].attn.qkv.adapter, LoRA)
    assert model.norm.weight.dtype == stored
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_model_section_of_another_shape_is_refused(packed, tmp_path):
    config = RunConfig(model=preset("tiny", num_hidden_layers=3), train=TrainConfig(init_from=str(packed)))
    with pytest.raises(
        ConfigError, match=r"has num_hidden_layers 2 and the model section says 3; leave that section out"
    ):
        begin(config, tmp_path / "run")


def test_a_save_has_the_weights_and_the_balancing_bias_of_its_step(config_file, tmp_path):
    run, overrides = tmp_path / "run", ["train.selection_bias_rate=0.01", "train.keep_saves=3"]
    train(config_file, overrides, output=run, console=io.StringIO())
    config, biases = load_config(RunConfig, run / "run.yaml"), []
    for step in (4, 8):
        model, (saved, _) = begin(config, run, step), weights.load(train_state.step_folder(run, step))
        assert_same_weights(model, saved)
        biases.append([block.moe.router.selection_bias for block in model.blocks])
        for ours, block in zip(biases[-1], saved.blocks):
            assert bool(ours.any()) and torch.equal(ours, block.moe.router.selection_bias)
    assert not torch.equal(biases[0][0], biases[1][0])
