"""Strict YAML into frozen dataclasses, and back. This file knows nobody's fields.

A config is a dataclass whose fields are either sections (dataclasses themselves) or values. Values come, later ones
winning, from the fields' defaults, a section's `preset`, the file named by `base`, the file itself and `--set
section.key=value`. Each value takes the type of its field, so `3e-4` is a float although YAML reads a string.

Three optional class attributes let a dataclass say more about itself:

- `PRESETS: ClassVar[dict[str, dict]]`: named starting points, chosen by the extra key `preset`;
- `ALIASES: ClassVar[dict[str, str]]`: names used elsewhere -> ours, offered when a key is unknown;
- `__post_init__`: checks across fields, raising :class:`~xmoe.errors.ConfigError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union

import yaml

from xmoe.errors import ConfigError

T = TypeVar("T")
Key = tuple[str, ...]  # ("optim", "lr")


@dataclasses.dataclass(frozen=True)
class _Given:
    """One value as the user wrote it, and where: `configs/a.yaml:3` or `--set`."""

    value: Any
    origin: str


def load_config(cls: type[T], path: str | Path | None = None, overrides: Iterable[str] = ()) -> T:
    """Fill `cls` from the YAML file at `path` (with its `base`) and `overrides` of the form `section.key=value`.

    Raises:
        ConfigError: a file that is missing or malformed, an unknown key, a value of the wrong type, a failed check.
    """
    return resolve(cls, path, overrides)[0]


def resolve(cls: type[T], path: str | Path | None = None, overrides: Iterable[str] = ()) -> tuple[T, dict[Key, str]]:
    """As :func:`load_config`, and where each value came from: key -> `default`, `preset NAME`, `FILE:LINE` or `--set`."""
    given = _read(Path(path), allow_base=True) if path is not None else {}
    for text in overrides:
        key, eq, value = text.partition("=")
        if not eq or not key.strip():
            raise ConfigError(f"--set {text}: expected section.key=value, for example optim.lr=3e-4")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        where = _Given(parsed, "--set")
        parts = tuple(key.strip().split("."))
        given = {k: v for k, v in given.items() if k[: len(parts)] != parts}
        given.update(_flatten(parts, where))
    origins: dict[Key, str] = {}
    return _build(cls, (), given, origins, cls), origins


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a config dataclass, tuples as lists, ready for YAML or JSON."""
    return _plain(config)


def dump_config(config: Any) -> str:
    """The resolved config as YAML that :func:`load_config` reads back to an equal value."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


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
                text = yaml.safe_dump(_plain(child), default_flow_style=True, width=10**6).strip().removesuffix("\n...")
                lines.append((f"{indent}{f.name}: {text}", origins.get(here, "default")))

    walk(config, ())
    width = min(60, max(len(a) for a, _ in lines) + 2)
    return "\n".join(f"{a:<{width}}# {b}" if b else a for a, b in lines) + "\n"


# ---------------------------------------------------------------------------------------------------- reading files


def _read(path: Path, allow_base: bool) -> dict[Key, _Given]:
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
    given: dict[Key, _Given] = {}
    for key_node, value_node in root.value:
        if key_node.value == "base":
            if not allow_base:
                raise ConfigError(
                    f"{path}:{_line(key_node)}: base of a base is not followed; inherit from one file only"
                )
            given = {**_read(path.parent / str(value_node.value), allow_base=False), **given}
    own = _leaves(root, path, ())
    own.pop(("base",), None)
    for key in own:  # what the child says about a key replaces all that its base said below that key
        given = {k: v for k, v in given.items() if k[: len(key)] != key}
    return {**given, **own}


def _leaves(node: yaml.Node, path: Path, key: Key) -> dict[Key, _Given]:
    """Flatten nested mappings to leaves. A mapping that a field takes whole (a dict) is put together again in `_build`."""
    found: dict[Key, _Given] = {}
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
            found[here] = _Given(value, f"{path}:{_line(key_node)}")
    return found


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _flatten(key: Key, given: _Given) -> dict[Key, _Given]:
    if isinstance(given.value, dict) and given.value:
        flat: dict[Key, _Given] = {}
        for k, v in given.value.items():
            flat.update(_flatten((*key, str(k)), _Given(v, given.origin)))
        return flat
    return {key: given}


# ------------------------------------------------------------------------------------------------- building dataclasses


def _build(cls: type[T], key: Key, given: dict[Key, _Given], origins: dict[Key, str], root: type) -> T:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    presets: Mapping[str, Mapping[str, Any]] = getattr(cls, "PRESETS", {})
    values: dict[str, Any] = {}
    if presets and ((*key, "preset")) in given:
        chosen = given.pop((*key, "preset"))
        if chosen.value not in presets:
            raise ConfigError(
                f"{_at(chosen.origin)}unknown preset {chosen.value!r} for {'.'.join(key) or cls.__name__}"
                f"{_did_you_mean(str(chosen.value), presets)}; there are {', '.join(presets)}"
            )
        for name, value in presets[chosen.value].items():
            values[name] = value
            origins[(*key, name)] = f"preset {chosen.value}"
    below: dict[str, dict[Key, _Given]] = {}
    for k, v in given.items():
        below.setdefault(k[len(key)], {})[k] = v
    for name, items in below.items():
        first = next(iter(items.values()))
        if name not in fields:
            raise ConfigError(_unknown(name, key, first.origin, cls, root))
        hint = hints[name]
        here = (*key, name)
        section = _section(hint)
        if section is not None:
            if here in items and items[here].value is None:  # `optim:` with nothing below it
                continue
            if here in items:
                raise ConfigError(
                    f"{_at(first.origin)}{'.'.join(here)} is a section; expected keys below it, "
                    f"found {items[here].value!r}"
                )
            values[name] = _build(section, here, items, origins, root)
            continue
        raw = items[here].value if here in items else _nest(items, len(here))
        try:
            values[name] = convert(raw, hint)
        except (ValueError, TypeError):
            raise ConfigError(
                f"{_at(first.origin)}{'.'.join(here)}: expected {describe_type(hint)}, found {raw!r}"
            ) from None
        origins[here] = first.origin
    for name in fields:  # sections that nobody mentioned still get their own defaults, recursively
        section = _section(hints[name])
        if name not in values and section is not None and _section_is_required(fields[name], hints[name]):
            values[name] = _build(section, (*key, name), {}, origins, root)
    missing = [
        n
        for n, f in fields.items()
        if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{'.'.join(key) or cls.__name__}: missing {', '.join(missing)}")
    try:
        return cls(**values)
    except ConfigError as e:
        files = {v.origin.rsplit(":", 1)[0] for v in given.values()}  # a check across fields names no single line
        raise ConfigError(f"{_at(files.pop() if len(files) == 1 else '')}{e}") from None


def _section(hint: Any) -> type | None:
    for option in typing.get_args(hint) if _is_union(hint) else (hint,):
        if dataclasses.is_dataclass(option):
            return option
    return None


def _section_is_required(field: dataclasses.Field, hint: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and not _is_union(hint)


def _nest(items: dict[Key, _Given], depth: int) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for k, v in items.items():
        spot = nested
        for part in k[depth:-1]:
            spot = spot.setdefault(part, {})
        spot[k[-1]] = v.value
    return nested


def _at(origin: str) -> str:
    return f"{origin}: " if origin else ""


# ----------------------------------------------------------------------------------------------------- types of values


def convert(value: Any, hint: Any) -> Any:
    """`value` as the annotated type `hint`; ValueError where that would lose or invent something."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if _is_union(hint):
        if value is None and type(None) in args:
            return None
        for option in args:
            if option is not type(None):
                try:
                    return convert(value, option)
                except (ValueError, TypeError):
                    continue
        raise ValueError
    if origin is typing.Literal:
        for option in args:
            if value == option and type(value) is type(option):
                return option
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or str(value) not in map(str, args):
            raise ValueError
        return next(option for option in args if str(option) == str(value))
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise ValueError
        if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
            if len(value) != len(args):
                raise ValueError
            return tuple(convert(v, a) for v, a in zip(value, args))
        return origin(convert(v, args[0]) for v in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError
        return {convert(k, args[0]): convert(v, args[1]) for k, v in value.items()}
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise ValueError
    if hint is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        if isinstance(value, str):
            number = float(value.replace("_", ""))  # 1e6 is how people write a million
            if not number.is_integer():
                raise ValueError
            return int(value.replace("_", "")) if value.replace("_", "").lstrip("+-").isdigit() else int(number)
        return int(value)
    if hint is float:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    if hint is str:
        if isinstance(value, (Mapping, list, tuple)) or value is None:
            raise ValueError
        return str(value)
    if hint is type(None):
        if value is None:
            return None
        raise ValueError
    if isinstance(value, hint):
        return value
    return hint(value)


def describe_type(hint: Any) -> str:
    """A type annotation in a user's words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        return " or ".join(describe_type(a) for a in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (tuple, list):
        return f"a list of {describe_type(args[0])}"
    if origin is dict:
        return f"a mapping of {describe_type(args[0])} to {describe_type(args[1])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


# ---------------------------------------------------------------------------------------------------- helpful refusals


def _unknown(name: str, key: Key, origin: str, cls: type, root: type) -> str:
    dotted = ".".join((*key, name))
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    if getattr(cls, "PRESETS", None):
        names.insert(0, "preset")
    suggestion = _nearest(name, key, cls, root)
    tail = f"did you mean {suggestion}?  " if suggestion else ""
    what = f"keys of {'.'.join(key)}" if key else "sections"
    shown = ", ".join(names) if len(names) <= 24 else ", ".join(names[:24]) + ", ..."
    return f"{_at(origin)}unknown key {dotted}; {tail}{what}: {shown}"


def _nearest(name: str, key: Key, cls: type, root: type) -> str | None:
    """Names used elsewhere come first, then spelling, then other sections; spelling alone misleads (`dim`, `top_k`)."""
    sections = _all_sections(root)
    alias = getattr(cls, "ALIASES", {}).get(name)
    if alias:
        return ".".join((*key, alias))
    for other_key, other in sections:
        if name in getattr(other, "ALIASES", {}):
            return ".".join((*other_key, other.ALIASES[name]))
    for other_key, other in sections:
        if any(f.name == name for f in dataclasses.fields(other)):
            return ".".join((*other_key, name))
    near = difflib.get_close_matches(name, [f.name for f in dataclasses.fields(cls)], 1, 0.6)
    if near:
        return ".".join((*key, near[0]))
    everything = {f.name: ".".join((*k, f.name)) for k, c in reversed(sections) for f in dataclasses.fields(c)}
    near = difflib.get_close_matches(name, everything, 1, 0.75)
    return everything[near[0]] if near else None


def _all_sections(cls: type, key: Key = ()) -> list[tuple[Key, type]]:
    found: list[tuple[Key, type]] = [(key, cls)]
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        section = _section(hints[f.name])
        if section is not None:
            found.extend(_all_sections(section, (*key, f.name)))
    return found


def _did_you_mean(name: str, options: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(options), 1, 0.5)
    return f" (did you mean {near[0]}?)" if near else ""
