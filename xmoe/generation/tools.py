"""Tools as GPT-OSS reads them: JSON schemas written out as a TypeScript-like namespace.

The model was trained on one particular way of writing these, so its peculiarities (where comments stand, how nested
objects are indented, that `anyOf` is `any`) are part of the format and not ours to tidy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

NAMES = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}


@dataclass(frozen=True)
class Tool:
    """A function the model may call: its name, what it does, and a JSON schema of its parameters (None: it has none)."""

    name: str
    description: str = ""
    parameters: dict | None = None


def namespace(name: str, tools: Sequence[Tool]) -> str:
    """The section that lists `tools`: `## name`, then one `type ... = (...) => any;` a tool."""
    lines = [f"## {name}", "", f"namespace {name} {{", ""]
    for tool in tools:
        lines += [f"// {line}" for line in tool.description.splitlines()]
        arguments = "" if tool.parameters is None else "_: " + _object(tool.parameters, "")
        lines += [f"type {tool.name} = ({arguments}) => any;", ""]
    return "\n".join([*lines, f"}} // namespace {name}"])


def _object(schema: dict, indent: str) -> str:
    text = f"{indent}// {schema['description']}\n" if "description" in schema else ""
    required = schema.get("required", ())
    properties = [
        _property(name, value, name in required, indent) for name, value in (schema.get("properties") or {}).items()
    ]
    return text + "{\n" + "".join(properties) + indent + "}"


def _property(name: str, schema: dict, required: bool, indent: str) -> str:
    head = indent + name + ("" if required else "?")
    title = [schema["title"], None] if "title" in schema else []
    description = [schema["description"]] if "description" in schema else []
    examples = (
        ["Examples:", *(f'- "{x}"' for x in schema["examples"] if isinstance(x, str))] if schema.get("examples") else []
    )
    if "oneOf" in schema:
        default = [f"default: {_json(schema['default'])}"] if "default" in schema else []
        variants = [
            f"{indent} | {_value(variant, indent + '   ')}{_remark(variant, bool(description) and number == 0)}\n"
            for number, variant in enumerate(schema["oneOf"])
        ]
        return (
            _comments([*title, *examples, *description, *default], indent) + f"{head}:\n{''.join(variants)}{indent},\n"
        )
    default = f" // default: {_default(schema)}" if "default" in schema else ""
    return (
        _comments([*title, *description, *examples], indent) + f"{head}: {_value(schema, indent + '    ')},{default}\n"
    )


def _comments(lines: Sequence[str | None], indent: str) -> str:
    """One comment a line; None is an empty one."""
    return "".join(f"{indent}//\n" if line is None else f"{indent}// {line}\n" for line in lines)


def _remark(variant: dict, described_above: bool) -> str:
    """What stands behind one variant of a union; the property's own description takes the place of the first one's."""
    words = [variant["description"]] if "description" in variant and not described_above else []
    words += [f"default: {_default(variant)}"] if "default" in variant else []
    return f" // {' '.join(words)}" if words else ""


def _value(schema: dict, indent: str) -> str:
    """The type of a property or of a variant of one: these can be nullable, the items of an array cannot."""
    return _type(schema, indent) + (" | null" if schema.get("nullable") and "oneOf" not in schema else "")


def _type(schema: dict, indent: str) -> str:
    if "oneOf" in schema:
        return "".join(f"\n{indent} | {_type(variant, indent + '   ')}" for variant in schema["oneOf"])
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(NAMES.get(one, one) for one in kind)
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return f"{_type(schema['items'], indent)}[]" if schema.get("items") else "Array<any>"
    name = NAMES.get(kind, "any")
    if kind == "string" and schema.get("enum"):
        name = " | ".join(f'"{value}"' for value in schema["enum"])
    return name


def _default(schema: dict) -> str:
    """A default among named values stands bare; any other is JSON."""
    value = schema["default"]
    return value if isinstance(value, str) and schema.get("enum") else _json(value)


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
