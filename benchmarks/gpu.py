"""Every CUDA kernel checked and measured in one go: `make gpu`, on a machine with an NVIDIA GPU, within 8 minutes.

Writes one JSON and one Markdown file, dated, under benchmarks/results/. A section that fails is written down as failed,
with its error, and the others go on. Exit code 0 when all ran and every check held, 1 otherwise.

    python3 benchmarks/gpu.py                              # everything; needs torch and triton, installs nothing
    python3 benchmarks/gpu.py --only correctness,experts
    python3 benchmarks/gpu.py tune                         # try tiles and write xmoe/kernels/cuda/tiles/sm_XX-tritonY.json
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # straight from a source tree, installed or not

import torch  # noqa: E402

from xmoe import command  # noqa: E402
from xmoe.errors import ConfigError  # noqa: E402
from xmoe.kernels.cuda import backend as triton_backend  # noqa: E402
from xmoe.outputs import new_file  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TIME_LIMIT = 460.0  # seconds, after which no further section starts

Section = Callable[[dict[str, Any]], dict[str, Any]]


def sections() -> dict[str, Section]:
    """Everything `make gpu` does, in order; each takes the results so far and returns its own."""
    import gpu_checks
    import gpu_peers
    import gpu_speed

    return {
        "ceilings": gpu_speed.ceilings,
        "correctness": gpu_checks.correctness,
        "experts": gpu_speed.expert_kernels,
        "small kernels": gpu_speed.small_kernels,
        "decode": gpu_speed.decode,
        "prefill": gpu_speed.prefill,
        "training layer": gpu_peers.training_layer,
        "packed training": gpu_peers.packed_training,
        "packed peers": gpu_peers.packed_peers,
    }


def run_sections(
    chosen: dict[str, Section], results: dict[str, Any], keep: Callable[[dict[str, Any]], None], limit: float
) -> bool:
    """Run each section, write results after each; False where one failed, was skipped for time, or a check did not hold."""
    began = time.monotonic()
    good = True
    for name, section in chosen.items():
        started = time.monotonic()
        if started - began > limit:
            outcome: dict[str, Any] = {"skipped": f"{limit:.0f} s were over before its turn"}
        else:
            try:
                outcome = section(results["sections"])
            except Exception as error:  # one broken section must not cost the others
                outcome = {
                    "error": f"{type(error).__name__}: {error}"[:2000],
                    "traceback": traceback.format_exc()[-4000:],
                }
        outcome["seconds"] = round(time.monotonic() - started, 2)
        good &= not ({"error", "skipped"} & set(outcome)) and all(
            row.get("ok", True) for row in outcome.get("rows", [])
        )
        results["sections"][name] = outcome
        results["seconds"] = round(time.monotonic() - began, 1)
        keep(results)
        print(f"{name}: {summary(outcome)} ({outcome['seconds']:.0f} s)", flush=True)
    return good


def summary(outcome: dict[str, Any]) -> str:
    """One line on a section: its error, or how many rows and how many of their checks held."""
    for word in ("error", "skipped"):
        if word in outcome:
            return f"{word}: {outcome[word].splitlines()[0][:160]}"
    rows = outcome.get("rows", [])
    checked = [row["ok"] for row in rows if "ok" in row]
    return f"{len(rows)} rows" + (f", {sum(checked)} of {len(checked)} checks held" if checked else "")


def environment() -> dict[str, Any]:
    """The machine and the code: device, driver, clocks, versions, commit."""
    device = torch.cuda.get_device_properties(0)
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    smi = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_gib": round(device.total_memory / 2**30, 1),
        "nvidia-smi": dict(zip(fields.split(","), (part.strip() for part in smi.split(",")))) if smi else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD") or "unknown",
        "changed_files": len(_output("git", "-C", str(ROOT), "status", "--porcelain").splitlines()),
    }


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def markdown(results: dict[str, Any]) -> str:
    """The same results to be read: the environment, then a table a section."""
    lines = [f"# GPU results, {results['date']}", ""]
    lines += [f"- {key}: {value}" for key, value in results["environment"].items()]
    for name, section in results["sections"].items():
        lines += ["", f"## {name} ({section['seconds']:.0f} s)", ""]
        if "error" in section or "skipped" in section:
            lines.append(f"**{summary(section)}**")
        for note in section.get("notes", []):
            lines += [note, ""]
        rows = section.get("rows", [])
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if columns:
            lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
            lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 0.01 else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def main(argv: list[str] | None = None) -> int:
    p = command.parser(__doc__.split("\n\n")[0], "python3 benchmarks/gpu.py --only correctness,decode")
    p.add_argument("action", nargs="?", choices=("run", "tune"), default="run", help="run (default) or tune")
    p.add_argument("--only", help="names of sections, comma-separated (default: all)")
    p.add_argument("--output", type=Path, help="folder for the results (default: benchmarks/results)")
    p.add_argument("--json", action="store_true", help="print the results as one JSON object and nothing else")
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        raise ConfigError(
            f"no CUDA device is visible to torch {torch.__version__}; run this on a machine with an NVIDIA GPU "
            "(without one, `make test` compiles every kernel and runs it in the interpreter)"
        )
    why_not = triton_backend.reason(torch.device("cuda"), torch.bfloat16)
    if why_not is not None:
        raise ConfigError(f"the kernels cannot run here: {why_not}")
    if args.action == "tune":
        import gpu_tune

        print(f"wrote {gpu_tune.tune()}")
        return 0
    chosen = sections()
    if args.only:
        names = [name.strip() for name in args.only.split(",")]
        if unknown := [name for name in names if name not in chosen]:
            raise ConfigError(f"unknown section {', '.join(unknown)}; expected some of {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in names}
    if args.json:
        sys.stdout, console = sys.stderr, sys.stdout
    now = datetime.now(timezone.utc)
    results: dict[str, Any] = {"date": now.isoformat(timespec="seconds"), "environment": environment(), "sections": {}}
    stem = (args.output or RESULTS) / f"gpu-{now:%Y%m%d-%H%M%S}"

    def keep(results: dict[str, Any]) -> None:
        for suffix, text in ((".json", json.dumps(results, indent=1, default=str)), (".md", markdown(results))):
            with new_file(stem.with_suffix(suffix), overwrite=True) as path:
                path.write_text(text + "\n" * (not text.endswith("\n")), encoding="utf-8")

    good = run_sections(chosen, results, keep, TIME_LIMIT)
    print(markdown(results))
    print(f"wrote {stem}.json and {stem}.md")
    if args.json:
        sys.stdout = console
        print(json.dumps(results, default=str))
    return 0 if good else 1


if __name__ == "__main__":
    command.run(main)
