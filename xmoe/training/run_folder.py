"""The run folder: what may be written where, checked before anything is.

checkpoints/NAME/
    config.json  model*.safetensors  tokenizer.json     the newest save, as every command takes it
    adapter.json  adapter.safetensors                   in their place where a run trains adapters beside another model
    run.yaml                                            the resolved config; can be run again
    metrics.jsonl                                       one line a log window, one a validation pass
    train_state/step-N/                                 the newest resume points
"""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from xmoe.checkpoint import train_state
from xmoe.config import dump_config, load_config, to_dict
from xmoe.errors import CheckpointError, ConfigError
from xmoe.outputs import check_free, new_file
from xmoe.training.config import RunConfig

CONFIG = "run.yaml"


def check_output(folder: Path, config: RunConfig, resume: bool, overwrite: bool) -> int:
    """Refuse a folder that must not be touched; return the step to resume from, 0 to start.

    A run goes on only under the model, data, optim and lora it began with.
    """
    filled = folder.is_dir() and any(folder.iterdir())
    is_run = (folder / CONFIG).is_file()
    if not resume:
        if filled and overwrite and not is_run:
            raise ConfigError(
                f"output folder {folder} holds something other than a run, which --overwrite will not remove; name another"
            )
        if filled and not overwrite:
            raise ConfigError(
                f"output folder {folder} already exists; --resume goes on with its run, --overwrite replaces it, "
                "--output names another"
            )
        if not folder.is_dir():
            check_free(folder)
        return 0
    if not filled:
        return 0
    if not is_run:
        raise CheckpointError(
            f"{folder} is no run folder (it has no {CONFIG}); give --output the folder of the run to resume"
        )
    before = load_config(RunConfig, folder / CONFIG)
    if before.train.init_from != config.train.init_from or (before.lora is None) != (config.lora is None):
        raise ConfigError(
            f"the run in {folder} began {_beginning(before)} and cannot go on {_beginning(config)}; start a new --output"
        )
    for section in ("model", "data", "optim", "lora"):
        was, now = to_dict(getattr(before, section)) or {}, to_dict(getattr(config, section)) or {}
        changed = [f"{section}.{key} was {was[key]!r}, is {now[key]!r}" for key in was if was[key] != now[key]]
        if changed:
            raise ConfigError(
                f"the run in {folder} cannot go on with other settings: {'; '.join(changed)}; start a new --output"
            )
    steps = train_state.saved_steps(folder)
    if steps and steps[-1] > config.train.steps:
        raise ConfigError(f"{folder} is at step {steps[-1]}, past train.steps {config.train.steps}; raise train.steps")
    return steps[-1] if steps else 0


def _beginning(config: RunConfig) -> str:
    what = "from random weights" if config.train.init_from is None else f"from {config.train.init_from}"
    return what + (" with adapters" if config.lora else "")


def check_disk(folder: Path, model: nn.Module, optimizer: str, saves: int) -> None:
    """Say now, not in an hour, that the disk is too small for `saves` resume points at a time and one in the making."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    each = parameters * 4 * (2 if optimizer == "muon" else 3)  # weights and one momentum, or two, in float32
    need = (saves + 1) * each
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise ConfigError(
            f"no disk space: {there} has {free / 1e9:.2f} GB free and the saves of this run need about {need / 1e9:.2f} GB; "
            "free some, lower train.keep_saves, or name another --output"
        )


def open_folder(folder: Path, config: RunConfig, resume_step: int, resume: bool) -> None:
    """The first thing that touches the disk: make the folder, or tidy what a killed run left, and write the config."""
    if not resume and folder.exists():
        shutil.rmtree(folder)  # empty, or a run that --overwrite gave up
    folder.mkdir(parents=True, exist_ok=True)
    train_state.sweep(folder)
    with new_file(folder / CONFIG, overwrite=True) as file:
        file.write_text(dump_config(config), encoding="utf-8")
    if resume_step:  # the kill may have come between a save and its publication
        train_state.publish(folder, resume_step)
