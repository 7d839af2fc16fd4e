"""xmoe: train, open, watch, shrink, talk to and measure Mixture-of-Experts language models.

The public names below are imported on first use, so that `import xmoe` stays fast and pulls in nothing heavy.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOME = {
    # build and train
    "ModelConfig": "xmoe.model.config",
    "preset": "xmoe.model.config",
    "Transformer": "xmoe.model.transformer",
    "build": "xmoe.model.transformer",
    "describe": "xmoe.model.describe",
    "train": "xmoe.training.trainer",
    # open and keep
    "load": "xmoe.checkpoint.weights",
    "save": "xmoe.checkpoint.weights",
    "Tokenizer": "xmoe.data.tokenizer",
    "batches": "xmoe.data.calibration_batches",
    # talk
    "generate": "xmoe.generation.generate",
    "stream": "xmoe.generation.generate",
    # watch and shrink
    "record_routing": "xmoe.compression.routing",
    "plan_pruning": "xmoe.compression.plan",
    "mask": "xmoe.compression.apply",
    "prune": "xmoe.compression.apply",
    "recover": "xmoe.compression.recover",
    # errors
    "XmoeError": "xmoe.errors",
    "ConfigError": "xmoe.errors",
    "DataError": "xmoe.errors",
    "CheckpointError": "xmoe.errors",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'xmoe' has no attribute {name!r}; it has {', '.join(_HOME)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
