"""Outputs appear whole or not at all: write beside the goal, then rename.

A rename within one folder is atomic on every file system we run on, so a reader (or a run that resumes after
`kill -9`) sees either nothing or everything. What a killed run leaves behind starts with a dot and ends in `.partial`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xmoe.errors import ConfigError


def check_free(path: str | Path, overwrite: bool = False) -> Path:
    """Return `path`, or raise :class:`ConfigError` where something stands there and `overwrite` is off."""
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return path
    if path.exists() and not overwrite:
        raise ConfigError(f"output {path} already exists; choose another name or pass --overwrite")
    return path


@contextlib.contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it becomes `path` when the block ends well and vanishes otherwise."""
    path = check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    partial.chmod(0o755)  # mkdtemp makes it private, but a checkpoint is for sharing
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        _replace_folder(partial, path)
    except BaseException as e:
        shutil.rmtree(partial, ignore_errors=True)
        _tell_where(e, partial, path)
        raise


@contextlib.contextmanager
def new_file(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` when the block ends well and vanishes otherwise."""
    path = check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)  # at the end: some writers put a new, private file in its place
        _flush(partial)
        os.replace(partial, path)
    except BaseException as e:
        partial.unlink(missing_ok=True)
        _tell_where(e, partial, path)
        raise


def _tell_where(error: BaseException, partial: Path, path: Path) -> None:
    """A system's error without a name, or about the partial output, gets the name that the user gave.

    The safetensors library tells of a full disk in a text, which becomes the system's error here.
    """
    if isinstance(error, OSError) and error.errno and str(partial) in str(error.filename or partial):
        error.filename = str(path)
    for number in (errno.ENOSPC, errno.EDQUOT):
        if not isinstance(error, OSError) and f"(os error {number})" in str(error):
            raise OSError(number, os.strerror(number), str(path)) from error


def _flush(file: Path) -> None:
    with open(file, "rb") as f:
        os.fsync(f.fileno())


def _replace_folder(partial: Path, path: Path) -> None:
    """A folder that is not empty cannot be renamed over, so the old one steps aside for an instant."""
    if not path.exists():
        os.rename(partial, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    os.rename(path, aside / "old")
    try:
        os.rename(partial, path)
    except BaseException:
        os.rename(aside / "old", path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
