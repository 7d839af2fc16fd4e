from __future__ import annotations

import random

import pytest
from hypothesis import settings

# Other work may share the machine, and no test here is about speed.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

WORDS = ("the", "router", "sends", "every", "token", "to", "two", "experts", "and", "weighs", "their", "answers")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, so that nothing is found that the test has not made."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XMOE_CACHE", str(folder))
    return folder


def prose(paragraphs: int, seed: int = 0) -> str:
    """Paragraphs of random words, all different, with blank lines between."""
    rng = random.Random(seed)
    lines = (" ".join(rng.choices(WORDS, k=rng.randint(20, 60))) + f" {seed}-{i}.\n\n" for i in range(paragraphs))
    return "".join(lines)


@pytest.fixture
def text_folder(tmp_path):
    """30 small files in two folders; each is one document."""
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    for i in range(30):
        place = folder / ("inner" if i % 3 else ".") / f"{i}.txt"
        place.write_text(prose(1 + i % 4, seed=i), encoding="utf-8")
    return folder


def visible(folder) -> list[str]:
    """Names in a cache folder, but for the locks."""
    return sorted(file.name for file in folder.iterdir() if not file.name.endswith(".lock"))
