"""Given values become dataclasses, section by section; a key that no section has is refused with the one that was meant."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from xmoe.config.values import convert, describe_type, is_union
from xmoe.config.yaml_file import Given, Key
from xmoe.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], key: Key, given: dict[Key, Given], origins: dict[Key, str], root: type) -> T:
    """`cls` filled from what is `given` below `key`; a value's origin is put into `origins`.

    Args:
        root: the whole config's class, in whose other sections a misplaced key may belong.

    Raises:
        ConfigError: an unknown or missing key, a value of the wrong type, a failed check.
    """
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
    below: dict[str, dict[Key, Given]] = {}
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
            values[name] = build(section, here, items, origins, root)
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
            values[name] = build(section, (*key, name), {}, origins, root)
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
    for option in typing.get_args(hint) if is_union(hint) else (hint,):
        if dataclasses.is_dataclass(option):
            return option
    return None


def _section_is_required(field: dataclasses.Field, hint: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and not is_union(hint)


def _nest(items: dict[Key, Given], depth: int) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for k, v in items.items():
        spot = nested
        for part in k[depth:-1]:
            spot = spot.setdefault(part, {})
        spot[k[-1]] = v.value
    return nested


def _at(origin: str) -> str:
    return f"{origin}: " if origin else ""


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
