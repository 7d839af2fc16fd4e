"""Everything falls downward: no file imports from a floor above its own, late imports included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the ground up. A file may import from its own room and from any floor below; rooms on one floor are siblings that
# do not know each other. The longest matching prefix counts.
FLOORS = [
    {"xmoe.errors"},
    {"xmoe.config", "xmoe.device", "xmoe.outputs", "xmoe.command", "xmoe.quantization"},
    {"xmoe.kernels", "xmoe.data"},
    {"xmoe.model"},
    {"xmoe.checkpoint", "xmoe.generation", "xmoe.parallel"},
    {"xmoe.training", "xmoe.compression", "evaluation"},
    {"scripts", "benchmarks"},
]
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# What stands in these folders is imported by its bare name, since Python puts a command's folder on the path.
NEIGHBOURS = {
    path.stem: top
    for top in ("scripts", "benchmarks")
    for path in (ROOT / top).iterdir()
    if not path.stem.startswith("__")
}
# The doors of the evaluation package are commands: they may import compression late, to try a plan or to record.
DOORS = {"evaluation.benchmark", "evaluation.deployment", "evaluation.report"}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in ROOMS:
            return ".".join(parts[:n])
    return NEIGHBOURS.get(parts[0])


def files() -> list[Path]:
    found = []
    for top in ("xmoe", "evaluation", "scripts", "benchmarks"):
        found += sorted((ROOT / top).rglob("*.py"))
    return [f for f in found if f != ROOT / "xmoe" / "__init__.py"]  # the public face imports late, from everywhere


def imports(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def climbs(path: Path) -> list[str]:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    here = room_of(module)
    assert here is not None, f"{module} has no floor; give it one in tests/test_floors.py"
    wrong = []
    for line, name in imports(path):
        there = room_of(name)
        if there is None or there == here or ROOMS[there] < ROOMS[here]:
            continue
        if module in DOORS and there == "xmoe.compression":
            continue
        if ROOMS[there] == ROOMS[here] and here in ("xmoe.command", "scripts", "benchmarks"):
            continue
        wrong.append(f"{path.relative_to(ROOT)}:{line} ({here}) imports {name}")
    return wrong


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_climbs(path):
    assert climbs(path) == []


def test_a_climbing_import_would_be_seen(tmp_path):
    (ROOT / "xmoe" / "model").is_dir()
    probe = tmp_path / "probe.py"
    probe.write_text("def f():\n    from xmoe.training import trainer\n")
    assert [name for _, name in imports(probe)] == ["xmoe.training.trainer"]
    assert ROOMS["xmoe.training"] > ROOMS["xmoe.model"]


def test_the_files_of_a_command_are_on_its_floor(monkeypatch):
    assert room_of("compress_commands.flags.add_output") == room_of("scripts.compress_commands.flags") == "scripts"
    assert room_of("prune_quality.train") == "benchmarks" and room_of("json.loads") is None
    monkeypatch.setitem(globals(), "imports", lambda path: [(1, "compress_commands.inputs.settings")])
    assert climbs(ROOT / "scripts" / "compress.py") == []
    assert climbs(ROOT / "xmoe" / "compression" / "plan.py") != []


def test_no_file_shadows_a_standard_module():
    import sys

    for top in ("scripts", "evaluation", "benchmarks"):
        for file in (ROOT / top).iterdir():
            assert file.stem not in sys.stdlib_module_names, f"{file} hides the standard library's {file.stem}"
