"""Keep memory that training frees, instead of handing it back to the system and faulting it in again every step.

glibc gives large blocks back at once. A training step frees and takes hundreds of megabytes; each new page costs a
fault and a cleared page, which on a virtual machine came to 3 GB/s against 50 GB/s for memory already there. Two
settings of the C library stop it; where that library is another (macOS, musl, Windows) nothing is done.
"""

from __future__ import annotations

import ctypes
import functools
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


@functools.cache
def keep_freed_pages() -> bool:
    """Make this process keep freed memory for its next allocations; True where that took effect. Idempotent."""
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
