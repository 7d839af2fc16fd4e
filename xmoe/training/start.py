"""Where a run starts: its tokenizer, and its model as the seed draws it, as a checkpoint has it or as a save left it."""

from __future__ import annotations

from pathlib import Path

import torch

from xmoe.checkpoint import adapters, sidecars, train_state, weights
from xmoe.checkpoint.opened import Checkpoint
from xmoe.config import to_dict
from xmoe.data.tokenizer import Tokenizer
from xmoe.errors import ConfigError
from xmoe.model.transformer import Transformer, build
from xmoe.training.adapters import add_adapters
from xmoe.training.config import RunConfig


def tokenizer(config: RunConfig) -> Tokenizer | None:
    """That of the checkpoint the run starts from, where it has one."""
    if config.train.init_from is None:
        return None
    checkpoint = Checkpoint(config.train.init_from)
    return sidecars.load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)


def model(config: RunConfig, output: Path, resume_step: int, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The model to train, on `device`, with the weights that the run began with or has saved.

    Args:
        output: the run folder, in which the weights are those after `resume_step`; 0 is the beginning.
        dtype: of the products. All weights that are trained are float32.

    Raises:
        ConfigError: the checkpoint in `train.init_from` is of another shape than the model section says.
    """
    saved = train_state.step_folder(output, resume_step) if resume_step else None
    if config.lora:
        return _beside(config, saved, device, dtype)
    source = config.train.init_from
    model = build(config.model, device, torch.float32, config.train.seed)
    if saved or source:
        start = weights.load(saved or source, device=device, dtype="float32", experts="dense")[0]
        if not saved:
            _check_shape(start, config)
        # Copied, not adopted: a tensor inside a mapped file may start at an odd address, and matrix products then add up
        # in another order than they did before the save.
        model.load_state_dict(start.state_dict())
        for block, other in zip(model.blocks, start.blocks):
            block.moe.router.selection_bias = other.moe.router.selection_bias
        if source:  # what else stands beside its weights comes along; the run folder has it once something was saved
            folder = output if saved else start.source.folder
            model.source = start.source._replace(folder=folder)
    return model


def _beside(config: RunConfig, saved: Path | None, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The checkpoint's model with adapters to train; it stays as it is stored, packed experts too, unless fp32 is asked for."""
    stored = "float32" if dtype == torch.float32 else "auto"
    model = weights.load(config.train.init_from, device=device, dtype=stored)[0]
    _check_shape(model, config)
    add_adapters(model, config.lora, config.train.seed)
    if saved:
        adapters.restore(model, saved)
    return model


def _check_shape(start: Transformer, config: RunConfig) -> None:
    if start.config != config.model:
        was, now = to_dict(start.config), to_dict(config.model)
        key = next(key for key in was if was[key] != now[key])
        raise ConfigError(
            f"{config.train.init_from} has {key} {was[key]!r} and the model section says {now[key]!r}; "
            "leave that section out"
        )
