"""A training run, readable top to bottom: `Trainer.run` is the loop, `Trainer.step` is one update.

    run = xmoe.train("configs/train/quickstart.yaml", overrides=["train.steps=200"])
    print(run.loss, run.checkpoint)

A run is bit for bit repeatable on the CPU, and a resumed run is the run that never stopped: everything that decides the next
step (weights, optimizer, position in the data, random state, running sums) is in the resume point, and everything else (rates,
the draw of the effort) depends on the step alone.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from xmoe import device as devices
from xmoe.checkpoint import adapters, train_state, weights
from xmoe.config import load_config, to_dict
from xmoe.data.stream import load_data
from xmoe.data.tokenizer import check_vocabulary
from xmoe.errors import ConfigError
from xmoe.kernels import dispatch
from xmoe.model.perplexity import bits_per_byte, mean_loss, perplexity
from xmoe.training import start
from xmoe.training.config import RunConfig
from xmoe.training.effort import EffortSampler
from xmoe.training.guard import Guard, gradient_norms
from xmoe.training.interrupt import Interruption
from xmoe.training.loss import StepLoad, training_loss
from xmoe.training.metrics import Log, Window
from xmoe.training.optim import Optimizer
from xmoe.training.run_folder import check_disk, check_output, open_folder
from xmoe.training.selection_bias import SelectionBias


@dataclass(frozen=True)
class Run:
    """What a finished run leaves: `loss` is the last validation loss in nats a token (NaN where nothing is held out)."""

    checkpoint: Path  # the run folder
    loss: float
    bits_per_byte: float
    loss_by_effort: dict[str, float]  # where the model has a reasoning_effort table, else empty
    steps: int
    tokens: int
    seconds: float  # of training steps in this process, without validation and saving


def train(
    config: str | Path | RunConfig,
    overrides: Iterable[str] = (),
    *,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: TextIO | None = None,
) -> Run:
    """Train a model from a config file (or a `RunConfig`) and return what came of it.

    Args:
        overrides: `section.key=value`, as `--set` takes them.
        output: the run folder; None is `checkpoints/NAME` after the config file's name.
        resume: go on from the newest save in `output`; without one, start.
        overwrite: replace an old run folder in `output`.
        console: where lines for the reader go; None is standard output.

    Raises:
        ConfigError, DataError: before anything is written.
        Diverged: the loss became NaN or jumped; the saves made so far are sound.
        KeyboardInterrupt: after Ctrl-C; the step in progress has been finished and saved.
    """
    if not isinstance(config, RunConfig):
        output = output or Path("checkpoints") / Path(config).stem
        config = load_config(RunConfig, config, overrides)
    if output is None:
        raise ConfigError("a run made from a RunConfig needs an output folder: train(config, output=...)")
    return Trainer(config, Path(output), resume=resume, overwrite=overwrite, console=console).run()


class Trainer:
    """One run: its parts, and the loop over them. Building it reads data and checks everything; nothing is written yet."""

    def __init__(
        self,
        config: RunConfig,
        output: Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        console: TextIO | None = None,
    ) -> None:
        self.config, self.output, self.console = config, Path(output), console or sys.stdout
        self.lead = devices.rank() == 0  # the one process that prints and writes
        self.device = devices.pick_device(config.train.device)
        self.dtype = devices.pick_dtype(config.train.precision, self.device)
        self.resume = resume and self.output.exists()
        self.resume_step = check_output(self.output, config, resume, overwrite)

        devices.seed_everything(config.train.seed + devices.rank())
        self.data = load_data(config.data, start.tokenizer(config))
        check_vocabulary(self.data.tokenizer, config.model.vocab_size)
        ranks = {"rank": devices.rank(), "world_size": devices.world_size()}
        self.batches = self.data.train_batches(config.train.micro_batch, seed=config.train.seed, **ranks)
        held_out = self.data.validation is not None
        self.validation = self.data.validation_batches(config.train.micro_batch, **ranks) if held_out else None
        self.model = start.model(config, self.output, self.resume_step, self.device, self.dtype)
        self.model.recompute = config.train.activation_checkpointing
        self.optimizer = Optimizer(self.model, config.optim, config.train.steps)
        rate = config.train.selection_bias_rate
        self.bias = SelectionBias(self.model, rate) if rate else None
        self.effort = self._effort()
        self.guard = Guard(config.train.spike_nats)
        self.window = Window()
        if self.resume_step:
            self._restore()
        check_disk(self.output, self.model, config.optim.name, config.train.keep_saves)

    # ------------------------------------------------------------------------------------------------------- the loop

    def run(self) -> Run:
        """Train to the last step. Ctrl-C finishes the step in progress, saves it and raises KeyboardInterrupt."""
        train, steps = self.config.train, self.config.train.steps
        if self.lead:
            open_folder(self.output, self.config, self.resume_step, self.resume)
        log = Log(
            self.output,
            self.config.log,
            steps,
            resumed_at=self.resume_step,
            console=self.console,
            settings=to_dict(self.config),
            silent=not self.lead,
        )
        for line in self.describe():
            log.say(line)
        tokens, seconds, validation = 0, 0.0, {}
        bar = tqdm(total=steps, initial=self.resume_step, unit="step", disable=None if self.lead else True)
        with contextlib.closing(log), bar, Interruption() as interruption:
            for step in range(self.resume_step, steps):
                began = time.perf_counter()
                terms, load, gates, count = self.step(step)
                devices.synchronize(self.device)
                took = time.perf_counter() - began
                self.window.add(terms, load.rows, gates, count, took)
                tokens, seconds = tokens + count, seconds + took
                bar.update()
                bar.set_postfix_str(f"{count / took:,.0f} tok/s", refresh=False)

                done = step + 1  # finished steps: what lines and folders are numbered by
                if done % self.config.log.every == 0 or done == steps:
                    log.train(done, {**self.window.record(), "lr": self.optimizer.lr(step)})
                if self.validation and (done % train.validate_every == 0 or done == steps):
                    validation = self.validate(every_effort=done == steps)
                    log.validation(done, validation)
                if done % train.save_every == 0 or done == steps or interruption.asked:
                    self.save(done)
                if interruption.asked and done < steps:
                    raise KeyboardInterrupt(
                        f"step {done} of {steps} is saved in {self.output}; the same command with --resume goes on from there"
                    )
            if self.validation and not validation:  # resumed at the last step: nothing was left to do
                validation = self.validate(every_effort=True)
            log.say(f"done: {self.output}")
        return Run(
            checkpoint=self.output,
            loss=validation.get("val_loss", math.nan),
            bits_per_byte=validation.get("val_bits_per_byte", math.nan),
            loss_by_effort=validation.get("val_loss_by_effort", {}),
            steps=steps,
            tokens=tokens,
            seconds=seconds,
        )

    def step(self, step: int) -> tuple[dict[str, Tensor], StepLoad, list[Tensor], int]:
        """One update of the weights from `grad_accum` micro batches.

        Returns the loss terms (means over the step's tokens), the rows per expert and the mean top gate of each layer, and the
        number of tokens.
        """
        train = self.config.train
        experts_per_token = self.effort.draw(step) if self.effort else None
        micro = [tuple(t.to(self.device) for t in next(self.batches)) for _ in range(train.grad_accum)]
        predicted = [int((targets != -100).sum()) for _, targets in micro]
        load, sums, gates = StepLoad(), None, None
        self.model.train()
        for (tokens, targets), count in zip(micro, predicted):
            with self._autocast():
                features = self.model.features(tokens, num_experts_per_tok=experts_per_token)
                losses = training_loss(
                    features,
                    self.model.unembedding,
                    targets,
                    load,
                    load_balancing_coef=train.load_balancing_coef,
                    z_loss_coef=train.z_loss_coef,
                )
            # Each token weighs the same, however the step was cut into micro batches.
            share = count / sum(predicted)
            (losses.total * share).backward()
            scaled = torch.stack([term.detach() * share for term in losses])
            top = torch.stack([r.weights.detach().amax(-1).mean() * share for r in features.routing])
            sums, gates = (scaled, top) if sums is None else (sums + scaled, gates + top)

        parts = gradient_norms(self.model)
        norm = torch.stack(list(parts.values())).norm()
        terms = dict(zip(("loss", "lm_loss", "load_balancing_loss", "z_loss"), sums))
        again = lambda: self._repeat(micro, experts_per_token)  # noqa: E731 (only called when something is wrong)
        self.guard.check(step + 1, float(terms["loss"]), parts, self.model, again)
        self.optimizer.clip(norm)
        self.optimizer.step(step)
        if self.bias:
            self.bias.update(load.rows, (step + 1) / train.steps)
        return {**terms, "grad_norm": norm}, load, list(gates), sum(t.numel() for t, _ in micro)

    def validate(self, every_effort: bool = False) -> dict[str, Any]:
        """Loss in nats a token, perplexity and bits per byte on the held-out documents, at the model's own K.

        With `every_effort`, also the loss at each row of the model's `reasoning_effort` table.
        """
        loss = self._mean_loss(None)
        line: dict[str, Any] = {
            "val_loss": loss,
            "val_perplexity": perplexity(loss),
            "val_bits_per_byte": bits_per_byte(loss, self.validation.bytes_per_token),
        }
        table = self.config.model.reasoning_effort
        if every_effort and table:
            line["val_loss_by_effort"] = {effort: self._mean_loss(k) for effort, k in table.items()}
        return line

    def save(self, done: int) -> None:
        """Write the resume point after `done` steps, then show its weights at the top of the run folder."""
        if not self.lead:
            return
        state = {
            "optimizer": self.optimizer.state_dict(),
            "data": self.batches.state_dict(),
            "random": train_state.random_state(),
            "window": self.window.state_dict(),
            "guard": self.guard.state_dict(),
            "selection_bias": self.bias.state_dict() if self.bias else None,
        }
        lora, base = self.config.lora, self.config.train.init_from
        with train_state.new_resume_point(self.output, done, state, self.config.train.keep_saves) as folder:
            if lora:
                adapters.save(self.model, folder, lora.settings, base=base, command="scripts/train.py")
            else:
                weights.save(self.model, folder, layout="native", tokenizer=self.data.tokenizer)
        train_state.publish(self.output, done)

    def _restore(self) -> None:
        """Take up all that `save` kept beside the weights, which the model has had from its start."""
        state = train_state.load_state(self.output, self.resume_step)
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["data"])
        self.window.load_state_dict(state["window"])
        self.guard.load_state_dict(state["guard"])
        if self.bias and state["selection_bias"]:
            self.bias.load_state_dict(state["selection_bias"])
            self.bias.apply(self.resume_step / self.config.train.steps)
        train_state.restore_random_state(state["random"])

    def describe(self) -> list[str]:
        """What a reader wants to know before the first step."""
        model, train = self.config.model, self.config.train
        total, active = model.parameter_count(), model.active_parameter_count()
        batch = train.micro_batch * train.grad_accum * self.config.data.seq_len
        lines = [
            f"model: {total / 1e6:.2f} M parameters, {active / 1e6:.2f} M of them at work on a token",
            f"data: {self.config.data.source}, {len(self.data.train):,} tokens to train on "
            f"({batch * train.steps / len(self.data.train):.2f} passes), "
            f"{len(self.data.validation or ()):,} held out, vocabulary {self.data.tokenizer.vocab_size:,}",
            f"run: {train.steps} steps of {batch:,} tokens on {self.device} in {str(self.dtype).removeprefix('torch.')} "
            f"-> {self.output}",
        ]
        if train.init_from:
            trained = sum(p.numel() for p in self.optimizer.parameters)
            ranks = ", ".join(f"{g} {r}" for g, r in self.config.lora.rank.items() if r) if self.config.lora else ""
            what = f"adapters of rank {ranks}: {trained / 1e6:.2f} M parameters beside" if ranks else "starting from"
            lines.append(f"{what} {train.init_from}" + (", which stays as it is" if ranks else ""))
        lines += dispatch.describe(self.device, self.dtype).splitlines()
        if self.resume_step:
            lines.append(f"resuming after step {self.resume_step}")
        elif self.resume:
            lines.append("nothing has been saved yet; starting at the beginning")
        return lines

    # ------------------------------------------------------------------------------------------------------- the parts

    def _autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _effort(self) -> EffortSampler | None:
        train, model = self.config.train, self.config.model
        if train.effort_sampling == "none":
            return None
        per_layer = train.effort_sampling == "layer"
        return EffortSampler(
            model.reasoning_effort, train.effort_weights, per_layer, model.num_hidden_layers, train.seed
        )

    def _repeat(self, micro: list[tuple[Tensor, Tensor]], experts_per_token: int | list[int] | None) -> None:
        for tokens, _ in micro:
            with self._autocast():
                self.model.features(tokens, num_experts_per_tok=experts_per_token)

    def _mean_loss(self, experts_per_token: int | None) -> float:
        return mean_loss(self.model, self.validation, dtype=self.dtype, num_experts_per_tok=experts_per_token)
