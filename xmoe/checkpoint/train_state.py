"""The resume point of a training run: all that weights alone do not say.

    RUN/train_state/step-00000400/
        config.json  model*.safetensors  tokenizer.json      a checkpoint like any other
        state.pt                                             optimizer, data position, random state, running sums

Each is written beside its place and renamed when complete, and the one before it is removed only then. So a run killed at any
instant, during a save too, finds a whole resume point: the newest folder of that name.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from xmoe.errors import CheckpointError
from xmoe.outputs import new_folder

FOLDER = "train_state"
STATE = "state.pt"
_NAME = re.compile(r"step-(\d+)")


def step_folder(run: Path, step: int) -> Path:
    """Where the resume point after `step` finished steps lives."""
    return Path(run) / FOLDER / f"step-{step:08d}"


def saved_steps(run: str | Path) -> list[int]:
    """Steps of all whole resume points of a run, oldest first."""
    folder = Path(run) / FOLDER
    names = (_NAME.fullmatch(p.name) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(m.group(1)) for m in names if m)


@contextlib.contextmanager
def new_resume_point(run: str | Path, step: int, state: dict[str, Any], keep: int = 1) -> Iterator[Path]:
    """Yield the folder to write the weights into; `state` is added, and the `keep` newest resume points stay."""
    goal = step_folder(Path(run), step)
    with new_folder(goal, overwrite=True) as partial:
        yield partial
        # A Python file, since torch's own writer turns a full disk into an error without a cause.
        with open(partial / STATE, "wb") as file:
            torch.save(state, file)
    for old in saved_steps(run)[:-keep]:
        shutil.rmtree(step_folder(Path(run), old))


def load_state(run: str | Path, step: int) -> dict[str, Any]:
    """The state saved at `step`; tensors on the CPU. Reads tensors and plain values only, never code."""
    path = step_folder(Path(run), step) / STATE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; {path.parent.name} is no resume point, remove it to use the one before"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as e:
        raise CheckpointError(
            f"{path} cannot be read ({e.__class__.__name__}); remove {path.parent} to resume one save earlier"
        ) from e


def publish(run: str | Path, step: int) -> None:
    """Put the weights of a resume point at the top of the run folder, where every command looks for them.

    Files are hard links where the file system has them (no second copy on disk), and each replaces its forerunner in one
    rename. Small files go first and the index of a sharded model last.
    """
    source, run = step_folder(Path(run), step), Path(run)
    files = sorted(
        (p for p in source.iterdir() if p.name != STATE), key=lambda p: (p.name.endswith("index.json"), p.name)
    )
    for file in files:
        partial = run / f".{file.name}.partial"
        partial.unlink(missing_ok=True)
        try:
            os.link(file, partial)
        except OSError:
            shutil.copyfile(file, partial)
        os.replace(partial, run / file.name)


def sweep(run: str | Path) -> None:
    """Remove what a killed save left behind: names that start with a dot and end in `.partial` or `.old`."""
    for folder in (Path(run), Path(run) / FOLDER):
        for path in folder.glob(".*") if folder.is_dir() else ():
            if path.name.endswith((".partial", ".old")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def random_state() -> dict[str, Any]:
    """Python's and torch's generators, on every device that has one."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set all generators as `random_state` found them; devices that are not here now are passed over."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
