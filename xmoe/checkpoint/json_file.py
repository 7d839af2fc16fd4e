"""A JSON file of a checkpoint, read with every mishap as one clear sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xmoe.checkpoint.wording import first_line
from xmoe.errors import CheckpointError


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; a CheckpointError where it is missing or malformed."""
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}; expected a checkpoint folder") from None
    except OSError as e:
        raise CheckpointError(f"cannot read {file}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file} is no JSON ({first_line(e)}); download or write it again") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is no JSON object; download or write it again")
    return content
