"""Break the Triton kernels on purpose, one place at a time, and see that a test notices. Run by hand: it takes minutes.

    python tests/kernels/cuda/mutations.py            # all of them; exit 1 if one goes unnoticed
    python tests/kernels/cuda/mutations.py rope norm  # those of some kernel files

Each mutation is made in a copy of the package, so the checkout is never touched; then the interpreted tests that concern the
file run there (and `test_ptx.py` for instructions the interpreter does not see).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
KERNELS = Path("xmoe/kernels/cuda")
PTX = "test_ptx"

# file, what stands there, what is put in its place, the tests that should notice
MUTATIONS = [
    ("mxfp4", "(word & 0x80) | (word & 0x0E)", "(word & 0x80) | (word & 0x06)", "mxfp4"),
    ("mxfp4", "(words >> 16 & 0xFF) * 0x01000100", "(words >> 8 & 0xFF) * 0x01000100", "mxfp4"),
    ("mxfp4", "tl.where(exponent == 0, 0x00400000, exponent << 23)", "exponent << 23", "mxfp4"),
    (
        "mxfp4",
        "row_ok = rows < tl.load(offsets + expert + 1)",
        "row_ok = rows < tl.load(offsets + expert + 1) + 1",
        "mxfp4",
    ),
    ("mxfp4", "biased = tl.where(split == 0, N, 0)", "biased = N", "mxfp4"),
    (
        "mxfp4",
        "gate = tl.minimum(tl.reshape(gate, (BN // 2, BM)), limit)",
        "gate = tl.reshape(gate, (BN // 2, BM))",
        "mxfp4",
    ),
    (
        "mxfp4",
        "active = gate * tl.sigmoid(alpha * gate) * (up + 1.0)",
        "active = gate * tl.sigmoid(alpha * gate) * up",
        "mxfp4",
    ),
    ("mxfp4", "inside = (in_block < N - n_tile * 64)[None, :]", "inside = (in_block < BN)[None, :]", "mxfp4"),
    ("mxfp4", "and.b32 a, $4, 0x8E8E8E8E;", "and.b32 a, $4, 0x8E8E8E86;", PTX),
    ("mxfp4", "prmt.b32 $3, b, 0, 0x3424;", "prmt.b32 $3, b, 0, 0x2434;", PTX),
    ("mxfp4", "prmt.b32 $2, $4, 0, 0x2424;", "prmt.b32 $2, $4, 0, 0x1424;", PTX),
    ("gemm", "inside = k < K - start", "inside = k < K", "experts"),
    ("gemm", "if bias is not None:\n        acc +=", "if bias is None:\n        acc +=", "experts"),
    (
        "gemm",
        "token = tl.load(order + rows, mask=row_ok, other=0) // TOP_K",
        "token = tl.load(order + rows, mask=row_ok, other=0)",
        "experts",
    ),
    ("gemm", "d_gate = tl.where(raw_gate <= limit, d_gate, 0.0)", "d_gate = d_gate", "experts"),
    ("gemm", "(1.0 + alpha * gate * (1.0 - sigma))", "(1.0 + gate * (1.0 - sigma))", "experts"),
    ("gemm", "incoming *= weight", "incoming *= 1.0", "experts"),
    ("routing", "rank = tl.cumsum(hit, 0) - hit", "rank = tl.cumsum(hit, 0)", "routing"),
    ("routing", "needed = (counts + BM - 1) // BM", "needed = counts // BM", "routing"),
    ("routing", "tl.exp(best - top) / total", "tl.exp(best - top)", "routing"),
    ("routing", "taken | (experts[None, :] == id[:, None])", "taken", "routing"),
    ("decode_attention", "(there[None, :] <= here[:, None])", "(there[None, :] < here[:, None])", "attention"),
    (
        "decode_attention",
        "here[:, None] - there[None, :] < window",
        "here[:, None] - there[None, :] <= window",
        "attention",
    ),
    ("decode_attention", "total += tl.exp2(sink - safe)", "total += 0.0", "attention"),
    ("decode_attention", "acc * shrink[:, None]", "acc", "attention"),
    ("flash_attention", "total += 1.0", "total += 0.0", "attention"),
    (
        "flash_attention",
        "useful = useful & (earliest - high < window)",
        "useful = useful & (earliest - high < 1)",
        "attention",
    ),
    (
        "norm",
        "scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)",
        "scale = tl.rsqrt(tl.sum(value * value, 0) / BD + eps)",
        "norm_rope",
    ),
    ("norm", "(tl.sum(gradient * unit, 0) / D)", "tl.sum(gradient * unit, 0)", "norm_rope"),
    ("norm", "present = d < tl.where(tl.load(indices + slot) >= 0, D, 0)", "present = d < D", "norm_rope"),
    ("rope", "x2 * c + x1 * z).to(out", "x2 * c - x1 * z).to(out", "norm_rope"),
    ("rope", "place = (b * L + position % L) * G", "place = (b * L + position) * G", "norm_rope"),
]


def noticed(room: Path, file: str, old: str, new: str, tests: str) -> bool:
    """Whether the tests fail with `old` replaced once by `new` in the copy under `room`."""
    path = room / KERNELS / f"{file}.py"
    text = path.read_text(encoding="utf-8")
    if old not in text:
        raise SystemExit(f"error: {file}.py no longer holds {old!r}; bring the list up to date")
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    try:
        here = Path("tests/kernels/cuda")
        target, mode = (here / f"{PTX}.py", "0") if tests == PTX else (here / "interpreted" / f"{tests}.py", "1")
        paths = os.pathsep.join((str(room), str(room / here / "interpreted")))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", str(target)],
            cwd=room,
            env=os.environ | {"TRITON_INTERPRET": mode, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
        if done.returncode in (
            2,
            3,
            4,
            5,
        ):  # pytest could not collect; a crash of the interpreter is a test that noticed
            raise SystemExit(f"error: the tests did not run: {done.stdout[-500:]}{done.stderr[-500:]}")
        return done.returncode != 0
    finally:
        path.write_text(text, encoding="utf-8")


def main() -> None:
    wanted = [mutation for mutation in MUTATIONS if len(sys.argv) < 2 or mutation[0] in sys.argv[1:]]
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        for part in ("xmoe", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, room / part)
        for mutation in wanted:
            caught = noticed(room, *mutation)
            unnoticed += not caught
            file, old, new, _ = mutation
            print(f"{'caught  ' if caught else 'UNNOTICED'} {file}: {old.strip()!r} -> {new.strip()!r}", flush=True)
    print(f"{len(wanted) - unnoticed} of {len(wanted)} caught")
    sys.exit(unnoticed > 0)


if __name__ == "__main__":
    main()
