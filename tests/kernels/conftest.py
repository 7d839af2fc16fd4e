"""What tests of the C kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from xmoe.kernels.cpu import build, library

_ALL = list(build.INSTRUCTION_SETS.get(build.machine(), {"base": []}))


@pytest.fixture(params=_ALL)
def instruction_set(request, monkeypatch) -> Iterator[str]:
    """Every set of kernels in the library in turn, this machine's best one and those below; skipped where it has none."""
    best = library.library().instruction_set
    if best not in _ALL or _ALL.index(request.param) < _ALL.index(best):
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("XMOE_CPU_ISA", request.param)
    library.library.cache_clear()
    assert library.library().instruction_set == request.param
    yield request.param
    monkeypatch.undo()
    library.library.cache_clear()
