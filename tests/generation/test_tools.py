"""Tools written out for the model. The texts were compared with openai-harmony's (see test_harmony.py, where it runs again)."""

from __future__ import annotations

import pytest

from xmoe.generation.tools import Tool, namespace


def arguments(properties, required=()):
    """What stands between the braces of a function with these properties."""
    tool = Tool("f", "", {"type": "object", "properties": properties, "required": list(required)})
    text = namespace("functions", [tool])
    return text.split("type f = (_: {\n")[1].split("}) => any;")[0]


def test_a_namespace_lists_its_tools():
    tools = [Tool("now", "Time.\nIn UTC."), Tool("stop", "", {"type": "object", "properties": {}})]
    assert namespace("functions", tools) == (
        "## functions\n\nnamespace functions {\n\n// Time.\n// In UTC.\ntype now = () => any;\n\n"
        "type stop = (_: {\n}) => any;\n\n} // namespace functions"
    )


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer", "default": 3}, "a?: number, // default: 3\n"),
        ({"type": "string", "enum": ["x", "y"], "default": "x"}, 'a?: "x" | "y", // default: x\n'),
        ({"type": "string", "default": "x"}, 'a?: string, // default: "x"\n'),
        ({"type": ["string", "null"]}, "a?: string | null,\n"),
        ({"type": "array", "items": {"type": "string", "nullable": True}, "nullable": True}, "a?: string[] | null,\n"),
        ({"type": "array"}, "a?: Array<any>,\n"),
        ({"anyOf": [{"type": "string"}]}, "a?: any,\n"),
        ({"type": "string", "description": "d", "title": "t"}, "// t\n//\n// d\na?: string,\n"),
        ({"type": "string", "examples": ["p", 1]}, '// Examples:\n// - "p"\na?: string,\n'),
        (
            {"type": "object", "description": "d", "properties": {"b": {"type": "boolean"}}},
            "// d\na?:     // d\n{\n    b?: boolean,\n    },\n",
        ),
        (
            {"oneOf": [{"type": "string", "description": "s"}, {"type": "number", "default": 2}], "default": "z"},
            '// default: "z"\na?:\n | string // s\n | number // default: 2\n,\n',
        ),
        (
            {
                "oneOf": [{"type": "string", "description": "s"}, {"type": "null", "description": "n"}],
                "description": "d",
            },
            "// d\na?:\n | string\n | any // n\n,\n",
        ),
        (
            {"type": "array", "items": {"oneOf": [{"type": "string"}, {"type": "number"}]}},
            "a?: \n     | string\n     | number[],\n",
        ),
    ],
)
def test_a_property_is_written_as_the_model_was_taught(schema, text):
    assert arguments({"a": schema}) == text


def test_required_properties_have_no_question_mark():
    assert arguments({"a": {"type": "string"}, "b": {}}, ["a"]) == "a: string,\nb?: any,\n"
