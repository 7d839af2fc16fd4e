"""What a run says about itself: a console line, `metrics.jsonl`, and wandb for those who want it.

Router health, per layer, from the rows (token, expert) that each expert received:

- MaxVio: largest load over the mean, minus 1. 0 is even; 1 means that some expert works twice its share (arXiv 2408.15664).
- load entropy: H(load) / ln E. 1 is even, 0 means that one expert does everything.
- dead: an expert below a tenth of its fair share over a window in which each would expect at least 200 rows. A shorter
  window says nothing (of 5 expected rows, chance alone gives 0 now and then), so the verdict is then left open.
- top gate: mean of the largest routing weight of a token. 1/K: the chosen experts share evenly; 1: the first does it all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TextIO

from torch import Tensor
from tqdm import tqdm

from xmoe.errors import ConfigError
from xmoe.model.router import router_health
from xmoe.outputs import new_file

DEAD_SHARE = 0.1  # of the fair share
DEAD_WINDOW = 200  # rows an expert would expect in the window that judges it


@dataclass(frozen=True)
class LogConfig:
    """The `log` section of a run. wandb is asked for, not assumed, and then writes to disk unless told to go online."""

    every: int = 10  # steps between log lines; each averages the steps since the one before
    wandb: bool = False
    wandb_project: str = "xmoe"
    wandb_mode: Literal["offline", "online"] = "offline"

    ALIASES: ClassVar[dict[str, str]] = {"log_every": "every", "log_interval": "every", "logging_steps": "every"}

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"log.every is {self.every}; expected 1 or more steps")


def dead_experts(counts: Tensor) -> list[int] | None:
    """Ids of experts below a tenth of the fair share; None while fewer than 200 rows an expert are expected."""
    fair = float(counts.sum()) / counts.numel()
    if fair < DEAD_WINDOW:
        return None
    return (counts < DEAD_SHARE * fair).nonzero().flatten().tolist()


class Window:
    """Everything since the last log line, added up; `record` turns it into one line and starts anew.

    Sums stay on the device until then, so that a step on a GPU need not wait for the log. The state can be saved and taken
    back: the first line after a resume then covers the same steps as in a run that never stopped.
    """

    def __init__(self) -> None:
        self._start()
        self._life: list[Tensor] = []  # rows per expert since the last verdict on dead experts

    def _start(self) -> None:
        self.steps, self.tokens, self.seconds = 0, 0, 0.0
        self._terms: dict[str, Tensor] = {}
        self._rows: list[Tensor] = []
        self._gates: list[Tensor] = []

    def add(
        self, terms: dict[str, Tensor], rows: Sequence[Tensor], gates: Sequence[Tensor], tokens: int, seconds: float
    ) -> None:
        """One step: scalar `terms` to be averaged, `rows` [E] of each layer, mean top gate of each layer, its cost."""
        self.steps, self.tokens, self.seconds = self.steps + 1, self.tokens + tokens, self.seconds + seconds
        for name, value in terms.items():
            value = value.detach().double() if value.device.type != "mps" else value.detach().float()
            self._terms[name] = self._terms[name] + value if name in self._terms else value
        self._rows = _add(self._rows, rows)
        self._gates = _add(self._gates, gates)
        self._life = _add(self._life, rows)

    def record(self) -> dict[str, Any]:
        """The line of this window; `dead_experts` is None where too few rows have been seen to judge."""
        rows = [r.cpu() for r in self._rows]
        life = [r.cpu() for r in self._life]
        dead = [dead_experts(r) for r in life]
        judged = all(d is not None for d in dead)
        line = {name: float(value) / self.steps for name, value in self._terms.items()}
        line["tokens_per_second"] = self.tokens / self.seconds if self.seconds else 0.0
        line["expert_load"] = [[round(v, 6) for v in (r.double() / max(1, int(r.sum()))).tolist()] for r in rows]
        health = [router_health(r) for r in rows]
        line["max_violation"] = [round(h.max_violation, 6) for h in health]
        line["load_entropy"] = [round(h.entropy, 6) for h in health]
        line["top_gate"] = [round(float(g) / self.steps, 6) for g in self._gates]
        line["dead_experts"] = dead if judged else None
        if judged:
            self._life = []
        self._start()
        return line

    def state_dict(self) -> dict:
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "terms": self._terms,
            "rows": self._rows,
            "gates": self._gates,
            "life": self._life,
        }

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.tokens, self.seconds = state["steps"], state["tokens"], state["seconds"]
        self._terms, self._rows, self._gates = state["terms"], state["rows"], state["gates"]
        self._life = state["life"]


def _add(sums: list[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    new = [n.detach() for n in new]
    return [s + n.to(s.device) for s, n in zip(sums, new)] if sums else new


class Log:
    """Where lines go: console, `metrics.jsonl` in the run folder, wandb. A rank other than 0 stays silent.

    Args:
        folder: the run folder; None keeps no file.
        resumed_at: steps already done. Lines of later steps are dropped from the file (the run that was killed had gone on
            after its last save), so the curve that results is one curve.
        console: where lines are printed; a command that prints JSON on standard output passes `sys.stderr`.
    """

    def __init__(
        self,
        folder: Path | None,
        config: LogConfig,
        total_steps: int,
        *,
        resumed_at: int = 0,
        console: TextIO | None = None,
        settings: dict | None = None,
        silent: bool = False,
    ) -> None:
        self.total_steps, self.console, self.silent = total_steps, console or sys.stdout, silent
        self._dead: list | None = None
        self._file = self._wandb = None
        if silent:
            return
        if config.wandb:
            self._wandb = _start_wandb(config, folder, settings or {})
        if folder is not None:
            path = folder / "metrics.jsonl"
            if resumed_at and path.exists():
                drop_lines_after(path, resumed_at)
            self._file = open(path, "a" if resumed_at else "w", encoding="utf-8")  # noqa: SIM115 (closed in close())

    def say(self, text: str) -> None:
        """One line for the person who watches, above the progress bar."""
        if not self.silent:
            tqdm.write(text, file=self.console)
            self.console.flush()

    def train(self, step: int, line: dict[str, Any]) -> None:
        """The line of a log window, after `step` finished steps; sounds the alarm when experts are dead."""
        self._write({"step": step, **line})
        # With one expert a layer there is no routing to speak of.
        vio = [v for v, load in zip(line["max_violation"], line["expert_load"]) if len(load) > 1]
        health = ""
        if vio:
            entropy = min(line["load_entropy"])
            health = f"  MaxVio {max(vio):.2f}  entropy {entropy:.3f}"
        self.say(
            f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  loss {line['lm_loss']:.4f}  "
            f"lr {line['lr']:.2e}  grad {line['grad_norm']:.2f}  {line['tokens_per_second']:,.0f} tok/s{health}"
        )
        dead = line["dead_experts"]
        if dead is not None:
            if any(dead) and dead != self._dead:
                where = "; ".join(f"layer {i}: {', '.join(map(str, d))}" for i, d in enumerate(dead) if d)
                count, of = sum(map(len, dead)), sum(map(len, line["expert_load"]))
                self.say(f"!! DEAD EXPERTS at step {step}: {count} of {of} get under 10 % of a fair share ({where})")
                self.say("!! a larger train.load_balancing_coef (0.01 is usual) brings them back")
            elif self._dead and any(self._dead) and not any(dead):
                self.say(f"no expert is dead any more at step {step}")
            self._dead = dead

    def validation(self, step: int, line: dict[str, Any]) -> None:
        """The line of a validation pass after `step` finished steps."""
        self._write({"step": step, **line})
        self.say(
            f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  validation loss {line['val_loss']:.4f}  "
            f"perplexity {line['val_perplexity']:.2f}  bits per byte {line['val_bits_per_byte']:.4f}"
        )

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._wandb is not None:
            self._wandb.log(flatten(line), step=line["step"])

    def close(self) -> None:
        """Close the file and end the wandb run."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def drop_lines_after(path: Path, step: int) -> None:
    """Rewrite a metrics file without the lines of later steps, and without a last line that a kill cut short."""
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    with new_file(path, overwrite=True) as tmp:
        tmp.write_text("".join(kept), encoding="utf-8")


def flatten(line: dict[str, Any]) -> dict[str, float]:
    """A metrics line as wandb likes it: numbers only, one a layer where there is one a layer."""
    flat: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, (int, float)):
            flat[name] = value
        elif name == "dead_experts" and value is not None:
            flat[name] = sum(map(len, value))
        elif name in ("max_violation", "load_entropy", "top_gate"):
            flat.update({f"{name}/layer_{i}": v for i, v in enumerate(value)})
    return flat


def _start_wandb(config: LogConfig, folder: Path | None, settings: dict):
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            "log.wandb is on but wandb is not installed; pip install wandb, or --set log.wandb=false"
        ) from None
    return wandb.init(
        project=config.wandb_project,
        name=folder.name if folder else None,
        dir=str(folder) if folder else None,
        mode=config.wandb_mode,
        config=settings,
        resume="allow",
    )
