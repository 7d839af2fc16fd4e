"""Compile the CPU kernels with the system's C compiler: `python -m xmoe.kernels.cpu.build`, or `pip install` through setup.py.

The sources are compiled once per instruction set and element type and linked into one shared library; the library picks
the best instruction set of the machine it runs on. Plain C and ctypes: neither Python's nor PyTorch's headers are
needed, so one library serves every version of both. It is not linked with an OpenMP runtime: those symbols resolve to
the one that torch has loaded, so there is one pool of threads.

The file name carries a hash of sources and flags; a library that does not fit its sources is never loaded. This module
imports nothing outside the standard library, so that an isolated build can run it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = ("attention.c", "attention_few.c", "decode_step.c", "experts.c", "few.c", "mxfp4.c", "pointwise.c")
HEADERS = (
    "vector.h", "product.h", "adapter.h", "attention.h", "decode_step.h", "integers.h", "activations.h", "few_integers.h",
    "kernels.h", "slots.h",
)  # fmt: skip
SOURCES = ("instruction_set.c", *HEADERS, *KERNELS)
ELEMENTS = {"bf16": ["-DXMOE_ELEMENT_BF16"], "f32": []}
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-w"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {  # by machine, best first; "base" is what every machine of that kind has
    "x86_64": {
        "avx512bf16": [*_AVX512, "-mavx512vnni", "-mavx512bf16"],
        "avx512": _AVX512,
        "avx2": ["-mavx2", "-mfma"],
        "base": [],
    },
    "aarch64": {"neonbf16": ["-march=armv8.2-a+bf16"], "base": []},
}


def machine() -> str:
    """The key of INSTRUCTION_SETS for this computer; other machines get plain C under their own name."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def library_name() -> str:
    """File name of the library that belongs to these sources and flags on this kind of machine."""
    digest = hashlib.sha256(repr((FLAGS, INSTRUCTION_SETS, ELEMENTS, sys.platform, machine())).encode())
    for name in SOURCES:
        digest.update((HERE / name).read_bytes())
    return f"_cpu_{digest.hexdigest()[:16]}.so"


def compiler() -> list[str] | None:
    """The C compiler as the beginning of a command: $CC, else cc, gcc or clang; None where there is none."""
    if os.environ.get("CC"):
        return os.environ["CC"].split()
    return next(([found] for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def build(folder: Path = HERE) -> Path:
    """Compile into `folder` (by default beside the sources) and return the library; a finished one is left as it is.

    Raises:
        RuntimeError: no compiler, or it failed; the message says which and what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / library_name()
    if target.exists():
        return target
    cc = compiler()
    if cc is None:
        raise RuntimeError("no C compiler found (looked for $CC, cc, gcc, clang)")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as room:
        openmp = next((f for f in (["-fopenmp"], ["-Xclang", "-fopenmp"]) if _accepts(cc, f, room)), [])
        jobs, sets = [], []
        for name, flags in INSTRUCTION_SETS.get(machine(), {"base": []}).items():
            if not _accepts(cc, flags, room):
                continue
            sets.append(name)
            for kernel in KERNELS:
                for element, define in ELEMENTS.items():
                    out = f"{room}/{Path(kernel).stem}_{element}_{name}.o"
                    defines = [f"-DXMOE_ISA={name}", f"-DXMOE_ELEMENT={element}", *define]
                    jobs.append(([*cc, *FLAGS, *openmp, *flags, *defines, "-c", str(HERE / kernel), "-o", out], out))
        defines = [f"-DXMOE_HAS_{name}" for name in sets]
        jobs.append(
            ([*cc, *FLAGS, *defines, "-c", str(HERE / "instruction_set.c"), "-o", f"{room}/cpu.o"], f"{room}/cpu.o")
        )
        _run_all([command for command, _ in jobs])
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        finished = f"{room}/finished.so"
        _run_all([[*cc, "-shared", *undefined, "-o", finished, *(out for _, out in jobs), "-lm"]])
        os.replace(finished, target)
    for stale in folder.glob("_cpu_*.so"):
        if stale != target:
            stale.unlink(missing_ok=True)
    return target


def _accepts(cc: list[str], flags: list[str], room: str) -> bool:
    """Whether the compiler takes these flags."""
    probe = Path(room, "probe.c")
    probe.write_text("int probe(void) { return 0; }\n")
    command = [*cc, "-Werror", *flags, "-c", str(probe), "-o", f"{room}/probe.o"]
    return subprocess.run(command, capture_output=True).returncode == 0


def _run_all(commands: list[list[str]]) -> None:
    """Run compiler commands, as many at a time as there are processors."""
    waiting, running = list(reversed(commands)), []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            command = waiting.pop()
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        process = running.pop(0)
        printed, _ = process.communicate()
        if process.returncode:
            for other in running:
                other.kill()
                other.communicate()
            raise RuntimeError(f"{' '.join(map(str, process.args))}\n{printed.strip()}")


if __name__ == "__main__":
    try:
        print(build())
    except RuntimeError as error:
        sys.exit(f"error: the C kernels were not built: {error}")
