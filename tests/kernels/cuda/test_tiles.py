"""The tile tables: complete, ordered, and chosen by rows."""

from __future__ import annotations

import json

import pytest
import torch

from xmoe.kernels.cuda import tiles

CPU = torch.device("cpu")
TABLES = sorted(path.stem for path in tiles.FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", TABLES)
def test_limits_rise_to_no_limit(name):
    table = json.loads((tiles.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert set(table) == {"arch", "triton", "measured", "kernels"}
    assert table["arch"] == name.split("-")[0]
    for kernel, found in table["kernels"].items():
        limits = [entry["rows"] for entry in found]
        assert limits[-1] is None and limits[:-1] == sorted(set(limits[:-1])), kernel
        assert all({"warps", "stages"} < set(entry) for entry in found)
        assert kernel in tiles.entries()


def test_the_first_entry_with_room_counts():
    limits = [entry["rows"] for entry in tiles.entries()["mxfp4_gate_up"]]
    for limit, entry in zip(limits[:-1], tiles.entries()["mxfp4_gate_up"]):
        expected = {key: value for key, value in entry.items() if key != "rows"}
        assert tiles.tile("mxfp4_gate_up", limit, CPU) == expected
        assert tiles.tile("mxfp4_gate_up", limit + 1, CPU) != expected
    tiles.tile("mxfp4_gate_up", 10**9, CPU)


def test_override_is_undone_and_handed_out_as_a_copy():
    before = tiles.tile("mxfp4_down", 1, CPU)
    with tiles.override({"mxfp4_down": {"BM": 1}}):
        inside = tiles.tile("mxfp4_down", 1, CPU)
        inside["BM"] = 2
        assert tiles.tile("mxfp4_down", 1, CPU) == {"BM": 1}
        assert tiles.tile("mxfp4_gate_up", 1, CPU)["BM"] > 2
    assert tiles.tile("mxfp4_down", 1, CPU) == before


def test_unknown_kernels_are_an_error():
    with pytest.raises(KeyError):
        tiles.tile("no_such_kernel", 1, CPU)
