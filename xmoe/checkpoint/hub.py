"""A folder or a hub name -> a local folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from xmoe.errors import CheckpointError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

# The published repositories hold the weights three times over; only the root folder is wanted.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.tiktoken", "LICENSE*", "USAGE_POLICY*"]
_UNWANTED = ["original/*", "metal/*", "*/*"]


def local_folder(name: str | Path) -> Path:
    """`name` itself where it is a folder, else the downloaded snapshot of the hub repository `org/name`.

    The download goes through huggingface_hub, so its cache, its token and HF_HUB_OFFLINE are honoured, and a download
    that was cut off goes on where it stopped.

    Raises:
        CheckpointError: neither a folder nor a repository that can be had, and why.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{name} is a file; expected the folder that holds config.json and the weights")
    if isinstance(name, Path) or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"no folder {name}; expected a checkpoint folder or a hub name such as openai/gpt-oss-20b"
        )
    return _download(name)


def _download(name: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise CheckpointError(
            f"no folder {name} here; to fetch it as a hub repository, pip install huggingface_hub"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except errors.GatedRepoError as e:
        raise CheckpointError(
            f"hub repository {name} asks for consent; accept its terms on its page and log in with `hf auth login`"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise CheckpointError(
            f"no folder {name} here, and the hub has no repository of that name (or only one that your token cannot see)"
        ) from e
    except Exception as e:  # timeouts, proxies, refused connections: each HTTP library has errors of its own
        if isinstance(e, OSError) and e.errno is not None and e.filename is not None:
            raise  # the disk, not the network
        offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({type(e).__name__})"
        raise CheckpointError(
            f"no folder {name} here, its files are not in the hub cache, and {why}; "
            "pass a local folder, or download it once with a network"
        ) from e
