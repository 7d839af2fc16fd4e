"""What a model is worth: benchmarks of its logits and of the text it writes, with one door, benchmark.py."""

from __future__ import annotations

from typing import Any

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    """`evaluate` is imported on first use, so that reading reports does not load torch."""
    if name == "evaluate":
        from evaluation.runner import evaluate

        return evaluate
    raise AttributeError(f"module 'evaluation' has no attribute {name!r}")
