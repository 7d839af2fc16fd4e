"""The projections of a model (attention's two of each layer, the unembedding) held in int8 on the CPU.

In a model with packed experts they are more than half of what a token reads, and decoding is limited by reading. The checkpoint
keeps them as they are; they are rounded when it is loaded, in groups of 32 inputs that share a scale, as the weights of
widely used files for llama.cpp are (Q8_0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from xmoe.errors import ConfigError
from xmoe.kernels.memory import empty_in_huge_pages
from xmoe.quantization.integer import encode_int8
from xmoe.quantization.packed import PackedWeight

GROUP = 32
CHOICES = ("stored", "int8")
_PIECE = 2 << 20  # values rounded at a time, few enough that what they take meanwhile is used again and again


def is_projection(name: str) -> bool:
    """Whether the native tensor `name` is one of them. Tied embeddings, whose rows are looked up too, are not."""
    return name == "head.weight" or name.endswith((".attn.qkv.weight", ".attn.out.weight"))


def check_choice(projections: str, device: torch.device) -> bool:
    """Whether to round them; or a ConfigError."""
    if projections not in CHOICES:
        raise ConfigError(f"projections={projections!r} is unknown; choose {' or '.join(CHOICES)}")
    if projections == "int8" and device.type != "cpu":
        raise ConfigError(f"projections='int8' is for the CPU, and the device is {device}; leave it out")
    return projections == "int8"


def in_int8(name: str, weight: Tensor) -> PackedWeight:
    """weight [out, in] as int8 [1, out, in], in huge pages where the system has them; a piece is in fp32 at a time.

    Raises:
        ConfigError: `in` is no multiple of 32.
        CheckpointError: the weight holds NaN or infinity.
    """
    rows, inputs = weight.shape
    if inputs % GROUP:
        raise ConfigError(
            f"projections='int8' takes inputs in groups of {GROUP}, and {name} has {inputs}; leave it out"
        )
    values = empty_in_huge_pages((1, rows, inputs), torch.int8)
    values = torch.empty(1, rows, inputs, dtype=torch.int8) if values is None else values
    scales = torch.empty(1, rows, inputs // GROUP, dtype=torch.bfloat16)
    step = max(1, _PIECE // inputs)
    for first in range(0, rows, step):
        piece = encode_int8(weight[first : first + step], GROUP)
        values[0, first : first + step], scales[0, first : first + step] = piece["values"], piece["scales"]
    return PackedWeight("int8", {"values": values, "scales": scales})
