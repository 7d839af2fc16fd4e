"""A YAML file with its `base`, flattened to keys with their values and where each was written."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import yaml

from xmoe.errors import ConfigError

Key = tuple[str, ...]  # ("optim", "lr")


@dataclasses.dataclass(frozen=True)
class Given:
    """One value as the user wrote it, and where: `configs/a.yaml:3` or `--set`."""

    value: Any
    origin: str


def read(path: Path, allow_base: bool) -> dict[Key, Given]:
    """The leaves of the file, before them those of its `base` that it says nothing about."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        guess = difflib.get_close_matches(path.name, near, 1, 0.4)
        hint = f"did you mean {path.parent / guess[0]}?" if guess else "check the path"
        raise ConfigError(f"config file {path} does not exist; {hint}") from None
    except (IsADirectoryError, UnicodeDecodeError, PermissionError) as e:
        raise ConfigError(
            f"config file {path} cannot be read: {e.__class__.__name__}; expected a YAML text file"
        ) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(e, 'problem', None) or e}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:1: expected sections (key: value), found {root.tag.rsplit(':', 1)[-1]}")
    given: dict[Key, Given] = {}
    for key_node, value_node in root.value:
        if key_node.value == "base":
            if not allow_base:
                raise ConfigError(
                    f"{path}:{_line(key_node)}: base of a base is not followed; inherit from one file only"
                )
            given = {**read(path.parent / str(value_node.value), allow_base=False), **given}
    own = _leaves(root, path, ())
    own.pop(("base",), None)
    for key in own:  # what the child says about a key replaces all that its base said below that key
        given = {k: v for k, v in given.items() if k[: len(key)] != key}
    return {**given, **own}


def _leaves(node: yaml.Node, path: Path, key: Key) -> dict[Key, Given]:
    """Flatten nested mappings to leaves. A mapping that a field takes whole (a dict) is put together again in `sections`."""
    found: dict[Key, Given] = {}
    seen: set[str] = set()
    for key_node, value_node in node.value:
        here = (*key, str(key_node.value))
        if key_node.value in seen:
            raise ConfigError(f"{path}:{_line(key_node)}: key {'.'.join(here)} is given twice")
        seen.add(key_node.value)
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            found.update(_leaves(value_node, path, here))
        else:
            value = yaml.constructor.SafeConstructor().construct_document(value_node)
            found[here] = Given(value, f"{path}:{_line(key_node)}")
    return found


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def flatten(key: Key, given: Given) -> dict[Key, Given]:
    """The leaves of a value that stands at `key`, itself where it is no mapping."""
    if isinstance(given.value, dict) and given.value:
        flat: dict[Key, Given] = {}
        for k, v in given.value.items():
            flat.update(flatten((*key, str(k)), Given(v, given.origin)))
        return flat
    return {key: given}
