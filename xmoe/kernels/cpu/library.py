"""Load the C library that `xmoe.kernels.cpu.build` compiled, and call its kernels: names, argument types, addresses.

Where there is no library, :func:`available` is False and :func:`reason` says why. Nothing is compiled here.
"""

from __future__ import annotations

import ctypes
import functools
import os

import torch
from torch import Tensor

from xmoe.errors import ConfigError
from xmoe.kernels.cpu import build

ELEMENTS = {torch.bfloat16: "bf16", torch.float32: "f32"}
PIECES = 16  # partial sums of a reduction over rows, as in pointwise.c
# argument types: p pointer, l int64, i int, f float
_SIGNATURES = {
    "attention_forward": "p",
    "attention_backward": "p",
    "rms_norm_forward": "pipppllf",
    "rms_norm_backward": "ppipppppll",
    "rope": "pllpplpllllf",
    "sort_by_expert": "pplllpppp",
    "gather_rows": "pppllppp",
    "swiglu_forward": "pppllffp",
    "swiglu_backward": "pppllffppppp",
    "grouped_product": "ppiipplllp",
    "grouped_gradient": "ppplllpi",
    "combine": "ppppppplll",
    "column_sums": "pppllp",
    "cross_entropy": "ppllfp",
    "few_rows": "ppppllpilllp",
    "packed_product": "pppplliplllp",
    "packed_experts": "pppppppppipplllllffpplfpplf",
    "decode_step": "p",
}
_ANSWERING = (
    "attention",
    "grouped",
    "few",
    "packed",
    "decode",
)  # kernels with a workspace: 1 when there is no memory for it
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}


class AttentionArguments(ctypes.Structure):
    """`struct attention` of attention.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "lse", "sinks", "dsinks")]
        + [(name, ctypes.c_void_p) for name in ("q_pos", "k_pos")]
        + [(n, ctypes.c_int64) for n in ("batch", "queries", "keys", "groups", "heads_per_group", "head_dim", "window")]
        + [(f"{n}_stride", ctypes.c_int64 * 3) for n in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")]
        + [("scale", ctypes.c_float)]
    )


class DecodeLayer(ctypes.Structure):
    """`struct decode_layer` of decode_step.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("attn_norm", "qkv", "qkv_scales", "qkv_bias")]
        + [(name, ctypes.c_void_p) for name in ("out", "out_scales", "out_bias", "sinks")]
        + [(name, ctypes.c_void_p) for name in ("moe_norm", "router", "router_bias")]
        + [
            (n, ctypes.c_void_p)
            for n in ("up", "up_scales", "up_zeros", "up_bias", "down", "down_scales", "down_zeros", "down_bias")
        ]
        + [(n, ctypes.c_void_p) for n in ("keys", "values", "slots", "key_positions", "kept", "selection_bias")]
        + [(name, ctypes.c_void_p) for name in ("logits", "weights", "norms", "indices")]
        + [(name, ctypes.c_int64) for name in ("room", "key_count", "window", "experts", "chosen")]
        + [(f"{weight}_{of}", ctypes.c_int64) for weight in ("qkv", "out", "up", "down") for of in ("group", "form")]
        + [(name, ctypes.c_float) for name in ("limit", "alpha")]
    )


class DecodeStepArguments(ctypes.Structure):
    """`struct decode_step` of decode_step.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("layer", "x", "cosine", "sine", "positions")]
        + [(n, ctypes.c_int64) for n in ("layers", "batch", "tokens", "width", "inner", "heads", "groups", "head_dim")]
        + [("angle_batch", ctypes.c_int64), ("eps", ctypes.c_float)]
    )


def _open(path: str) -> ctypes.CDLL:
    """Load the library. Its OpenMP symbols are torch's; where torch has none to offer, the system's are brought in."""
    try:
        return ctypes.CDLL(path)
    except OSError:
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(path)


class Library:
    """The loaded library: `kernels[name, dtype]` are its functions for the best instruction set of this machine."""

    def __init__(self) -> None:
        self.reason, self.instruction_set, self.kernels = "", "", {}
        try:
            path = build.HERE / build.library_name()
            if not path.exists():
                self.reason = "the C kernels are not built; `python -m xmoe.kernels.cpu.build` builds them"
                return
            library = _open(str(path))
        except OSError as error:
            self.reason = f"the C kernels do not load: {error}"
            return
        library.xmoe_best_instruction_set.restype = ctypes.c_char_p
        best = library.xmoe_best_instruction_set().decode()
        self.instruction_set = os.environ.get("XMOE_CPU_ISA", best)  # to try a lesser one than this machine's best
        sets = list(build.INSTRUCTION_SETS.get(build.machine(), {"base": []}))
        if self.instruction_set not in sets[sets.index(best) :]:
            offer = ", ".join(sets[sets.index(best) :])
            raise ConfigError(f"XMOE_CPU_ISA is {self.instruction_set!r}; this machine can run {offer}")
        for name, signature in _SIGNATURES.items():
            for dtype, element in ELEMENTS.items():
                function = getattr(library, f"{name}_{element}_{self.instruction_set}")
                function.argtypes = [_TYPES[t] for t in signature]
                function.restype = ctypes.c_int if name.startswith(_ANSWERING) else None
                self.kernels[name, dtype] = function


@functools.cache
def library() -> Library:
    """The library of this process, loaded at first use."""
    return Library()


def available() -> bool:
    """Whether the C library is there and loads."""
    return bool(library().kernels)


def reason() -> str:
    """Why :func:`available` is False; empty where it is True."""
    return library().reason


def describe() -> str:
    """One line: the instruction set in use, or why there is none."""
    return f"C kernels, {library().instruction_set}" if available() else reason()


def run(name: str, dtype: torch.dtype, *arguments: int | float | Tensor | None) -> None:
    """Call a kernel for elements of `dtype`; a tensor stands for its address, None for no address.

    Raises:
        MemoryError: there is none for the kernel's workspace.
    """
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if library().kernels[name, dtype](*values):
        raise MemoryError(f"no memory for the workspace of {name}")
