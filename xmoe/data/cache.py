"""Where what can be made again is kept: trained tokenizers, token arrays, texts from the hub."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from xmoe.errors import DataError


def cache_folder(kind: str) -> Path:
    """The folder for one kind of derived file below `$XMOE_CACHE`, or `~/.cache/xmoe`; safe to delete at any time.

    Raises:
        DataError: the folder cannot be made.
    """
    folder = Path(os.environ.get("XMOE_CACHE") or Path.home() / ".cache" / "xmoe") / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot make the cache folder {folder} ({error.strerror}); set XMOE_CACHE to another"
        ) from error
    return folder


@contextlib.contextmanager
def one_maker(path: Path) -> Iterator[None]:
    """Wait until no other process (another rank of the same run, say) is making `path`; look again before making it.

    The lock ends with the process that holds it, however that ends, so its file may stay.
    """
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest(*parts: object) -> str:
    """24 hexadecimal digits that stand for these values: texts, numbers and None by their repr, bytes by content."""
    state = hashlib.blake2b(digest_size=12)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        state.update(len(data).to_bytes(8, "little"))  # so that ("ab", "c") differs from ("a", "bc")
        state.update(data)
    return state.hexdigest()
