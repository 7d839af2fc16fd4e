"""Where and how we run: device, dtype, seed, rank, synchronisation, memory. The one file that asks torch about hardware."""

from __future__ import annotations

import os
import random
import sys

import torch

from xmoe.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def available_devices() -> list[str]:
    """Names that :func:`pick_device` accepts on this machine, best first."""
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is this rank's CUDA device, else MPS, else the CPU; anything absent is a :class:`ConfigError`."""
    here = available_devices()
    if name == "auto":
        if here[0].startswith("cuda"):
            return torch.device("cuda", local_rank() % torch.cuda.device_count())
        return torch.device(here[0])
    wanted = f"cuda:{local_rank()}" if name == "cuda" and local_rank() else "cuda:0" if name == "cuda" else name
    if wanted not in here:
        raise ConfigError(f"device {name!r} is not on this machine; it has {', '.join(here)} (or say auto)")
    return torch.device(wanted)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes it natively (CUDA, MPS, CPUs with bf16 dot products), else float32."""
    if name == "auto":
        return torch.bfloat16 if _has_native_bfloat16(device) else torch.float32
    if name not in DTYPES:
        hint = "; float16 overflows in GPT-OSS's residual stream" if name in ("float16", "fp16", "half") else ""
        raise ConfigError(f"dtype {name!r} is unknown; choose auto, {' or '.join(DTYPES)}{hint}")
    return DTYPES[name]


def _has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return bool(supported and supported()) and _cpu_flag("avx512_bf16", "bf16")
    return device.type == "mps"


def _cpu_flag(*names: str) -> bool:
    try:
        with open("/proc/cpuinfo") as f:
            flags = next((line for line in f if line.startswith(("flags", "Features"))), "").split()
    except OSError:
        return False
    return any(n in flags for n in names)


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators on every device."""
    random.seed(seed)
    torch.manual_seed(seed)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what it was given; returns at once on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes: allocated on CUDA since the last reset, of the process's lifetime on the CPU, None on MPS (no counter)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def rank() -> int:
    """This process's number among all of the run (0 when alone), as torchrun sets it."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", 1))
