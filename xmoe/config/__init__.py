"""Strict YAML into frozen dataclasses, and back. Nothing here knows anybody's fields.

A config is a dataclass whose fields are either sections (dataclasses themselves) or values. Values come, later ones
winning, from the fields' defaults, a section's `preset`, the file named by `base`, the file itself and `--set
section.key=value`. Each value takes the type of its field, so `3e-4` is a float although YAML reads a string.

Three optional class attributes let a dataclass say more about itself:

- `PRESETS: ClassVar[dict[str, dict]]`: named starting points, chosen by the extra key `preset`;
- `ALIASES: ClassVar[dict[str, str]]`: names used elsewhere -> ours, offered when a key is unknown;
- `__post_init__`: checks across fields, raising :class:`~xmoe.errors.ConfigError`.

`yaml_file` reads, `sections` fills the dataclasses and says what is wrong with a key, `values` knows types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from xmoe.config.sections import build
from xmoe.config.values import plain
from xmoe.config.yaml_file import Given, Key, flatten, read
from xmoe.errors import ConfigError

T = TypeVar("T")


def load_config(cls: type[T], path: str | Path | None = None, overrides: Iterable[str] = ()) -> T:
    """Fill `cls` from the YAML file at `path` (with its `base`) and `overrides` of the form `section.key=value`.

    Raises:
        ConfigError: a file that is missing or malformed, an unknown key, a value of the wrong type, a failed check.
    """
    return resolve(cls, path, overrides)[0]


def resolve(cls: type[T], path: str | Path | None = None, overrides: Iterable[str] = ()) -> tuple[T, dict[Key, str]]:
    """As :func:`load_config`, and where each value came from: key -> `default`, `preset NAME`, `FILE:LINE` or `--set`."""
    given = read(Path(path), allow_base=True) if path is not None else {}
    for text in overrides:
        key, eq, value = text.partition("=")
        if not eq or not key.strip():
            raise ConfigError(f"--set {text}: expected section.key=value, for example optim.lr=3e-4")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        where = Given(parsed, "--set")
        parts = tuple(key.strip().split("."))
        given = {k: v for k, v in given.items() if k[: len(parts)] != parts}
        given.update(flatten(parts, where))
    origins: dict[Key, str] = {}
    return build(cls, (), given, origins, cls), origins


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a config dataclass, tuples as lists, ready for YAML or JSON."""
    return plain(config)


def dump_config(config: Any) -> str:
    """The resolved config as YAML that :func:`load_config` reads back to an equal value."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def explain(config: Any, origins: Mapping[Key, str]) -> str:
    """What `--print-config` shows: YAML, each value followed by where it came from."""
    lines: list[tuple[str, str]] = []

    def walk(value: Any, key: Key) -> None:
        for f in dataclasses.fields(value):
            child = getattr(value, f.name)
            here = (*key, f.name)
            indent = "  " * len(key)
            if dataclasses.is_dataclass(child):
                lines.append((f"{indent}{f.name}:", ""))
                walk(child, here)
            else:
                text = yaml.safe_dump(plain(child), default_flow_style=True, width=10**6).strip().removesuffix("\n...")
                lines.append((f"{indent}{f.name}: {text}", origins.get(here, "default")))

    walk(config, ())
    width = min(60, max(len(a) for a, _ in lines) + 2)
    return "\n".join(f"{a:<{width}}# {b}" if b else a for a, b in lines) + "\n"
