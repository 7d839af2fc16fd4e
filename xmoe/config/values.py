"""A value as YAML has it, and the same as a type annotation asks for it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union


def convert(value: Any, hint: Any) -> Any:
    """`value` as the annotated type `hint`; ValueError where that would lose or invent something."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if is_union(hint):
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
    if is_union(hint):
        return " or ".join(describe_type(a) for a in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (tuple, list):
        return f"a list of {describe_type(args[0])}"
    if origin is dict:
        return f"a mapping of {describe_type(args[0])} to {describe_type(args[1])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def is_union(hint: Any) -> bool:
    """Whether it is `A | B`, however written."""
    return typing.get_origin(hint) in (Union, types.UnionType)


def plain(value: Any) -> Any:
    """The same as YAML and JSON have it: dataclasses as mappings, tuples as lists, paths as texts."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
