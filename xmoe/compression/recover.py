"""Win quality back after a cut: distil the uncut model into the routers alone, the experts, or all that is left.

The student learns to give the next-token distribution of the teacher on any text, so no labels are needed:

    loss = mean over tokens of KL(teacher || student) = sum_v p_v (log p_v - log q_v)

Training the routers alone ("Router KD", arXiv 2603.02217) moves 2.2 million parameters on gpt-oss-20b: after a cut they
still send tokens by what the missing experts would have done. Experts may stay packed for that.

Packed experts can be trained themselves: they are decoded to fp32 meanwhile, 24 bytes a weight with gradient, moments and
what the kernels see (:func:`xmoe.compression.unpacked.memory` says how much), and encoded again at the end in the form they
had. Low-rank weights are trained as factors. Training sees the rounded weights, so that it learns to live with what will
be stored; :class:`Recovery` has the loss before, at the end without rounding, and as stored.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from xmoe.compression.layerwise import Batch, as_batches
from xmoe.compression.unpacked import formats, unpacked
from xmoe.errors import ConfigError, DataError
from xmoe.kernels import dispatch
from xmoe.model.transformer import Transformer

TRAINABLE = ("routers", "experts", "all")
LEARNING_RATE = {"routers": 3e-3, "experts": 5e-4, "all": 3e-4}
"""Adam's, where none is given."""

_CHUNK = 1024  # tokens whose [., V] logits are held at a time

MEASURED = 16_384
"""Tokens of the text, the first ones, on which losses are compared where packed experts are trained."""


class Recovery(NamedTuple):
    """losses: KL in nats a token, one a step. parameters: how many were trained. tokens: how many were seen.

    before, trained, stored: where packed experts were trained, the mean KL over the first :data:`MEASURED` tokens before
    the first step, after the last in floating point, and as the experts are encoded again; else None. The weights are
    trained to be rounded, so `trained`, which leaves that out, may be the larger of the last two.
    """

    losses: list[float]
    parameters: int
    tokens: int
    before: float | None = None
    trained: float | None = None
    stored: float | None = None


def recover(
    student: Transformer,
    teacher: Transformer,
    batches: Iterable,
    *,
    train: str = "routers",
    steps: int = 200,
    lr: float | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Recovery:
    """Train `student` in place to agree with `teacher` on the text of `batches`, gone through as often as `steps` needs.

    Adam with a short warm-up and a cosine to a tenth of `lr`; gradients clipped to norm 1. Parameters that are trained are
    held in fp32 meanwhile and return to their type at the end, packed experts to their form.

    Args:
        batches: token ids [B, S], or pairs with a mask, as for recording; kept in memory.
        train: `routers`, `experts` (routers too, since what they choose among changes) or `all`.
        lr: peak learning rate; None is :data:`LEARNING_RATE`.
        on_step: called with the step's number and its loss.

    Raises:
        ConfigError: an unknown choice; models of different vocabularies. DataError: no tokens.
    """
    if train not in TRAINABLE:
        raise ConfigError(f"recover can train {', '.join(TRAINABLE)}, not {train!r}")
    if steps < 1:
        raise ConfigError(f"recover needs at least 1 step, not {steps}")
    if student.config.vocab_size != teacher.config.vocab_size:
        raise ConfigError(
            f"student and teacher have vocabularies of {student.config.vocab_size} and {teacher.config.vocab_size}; "
            "the teacher must be the model that was cut"
        )
    data = [b for b in as_batches(batches, student.device) if b.mask is None or bool(b.mask.any())]
    if not data:
        raise DataError("no tokens to recover on: the batches are empty or all padding; give more text")
    optimizer_lr = LEARNING_RATE[train] if lr is None else lr
    was_training, seen, losses = student.training, 0, []
    teacher_was_training = teacher.training
    before = trained = None
    student.eval()
    teacher.eval()
    packed = train != "routers" and bool(formats(student))
    if packed:
        before = divergence(student, teacher, data)
    student.train()
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(unpacked(student, packed))
        chosen = trained_parameters(student, train) + ([] if held is None else held.parameters)
        stack.enter_context(_only(student, chosen))
        autocast = stack.enter_context(_in_fp32(chosen))
        optimizer = torch.optim.AdamW(chosen, lr=optimizer_lr, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, steps))
        bar = tqdm(itertools.islice(itertools.cycle(data), steps), total=steps, desc="recovering", disable=None)
        for step, batch in enumerate(bar):
            with torch.no_grad():
                goal = _hidden(teacher, batch)
            if held is not None:
                held.compose()
            with torch.autocast(student.device.type, torch.bfloat16, enabled=autocast):
                hidden = _hidden(student, batch)
                loss = _distil(student, teacher, hidden, goal, batch.mask)
            nn.utils.clip_grad_norm_(chosen, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            seen += batch.real_tokens
            losses.append(loss)
            bar.set_postfix(kl=f"{loss:.4f}")
            if on_step is not None:
                on_step(step, loss)
        if held is not None:
            with torch.no_grad():
                held.compose(rounded=False)
            trained = divergence(student, teacher, data, autocast)
    student.eval()
    stored = divergence(student, teacher, data) if packed else None
    student.train(was_training)
    teacher.train(teacher_was_training)
    return Recovery(losses, sum(p.numel() for p in chosen), seen, before, trained, stored)


@torch.no_grad()
def divergence(student: Transformer, teacher: Transformer, data: Iterable[Batch], autocast: bool = False) -> float:
    """Mean KL(teacher || student) in nats a token over the first :data:`MEASURED` tokens, or a batch more."""
    total, count = 0.0, 0
    for batch in data:
        wanted = _real(_hidden(teacher, batch), batch.mask)
        with torch.autocast(student.device.type, torch.bfloat16, enabled=autocast):
            given = _real(_hidden(student, batch), batch.mask)
            for start in range(0, len(given), _CHUNK):
                part = slice(start, start + _CHUNK)
                total += float(_kl(student, teacher, given[part], wanted[part]))
        count += len(given)
        if count >= MEASURED:
            break
    return total / count


def trained_parameters(model: Transformer, train: str) -> list[nn.Parameter]:
    """What `train` names: routers; routers and experts; or everything. Packed weights are no parameters."""
    if train == "all":
        return list(model.parameters())
    modules = [block.moe.router if train == "routers" else block.moe for block in model.blocks]
    return [p for module in modules for p in module.parameters()]


def _warm_cosine(step: int, steps: int) -> float:
    warm = min(10, max(1, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _distil(student: Transformer, teacher: Transformer, hidden: Tensor, goal: Tensor, mask: Tensor | None) -> float:
    """Mean KL over real tokens, and its gradients, without ever holding more than a chunk of logits over the vocabulary.

    Each chunk goes backward to the hidden states at once; the gradient collected there then goes on into the model.
    """
    flat, goal = _real(hidden, mask), _real(goal, mask)
    leaf = flat.detach().requires_grad_()
    total = 0.0
    for start in range(0, leaf.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        loss = _kl(student, teacher, leaf[part], goal[part]) / leaf.shape[0]
        loss.backward()
        total += float(loss.detach())
    flat.backward(leaf.grad)
    return total


def _real(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """[B, S, D] -> [T, D], without padding."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat if mask is None else flat[mask.reshape(-1)]


def _kl(student: Transformer, teacher: Transformer, hidden: Tensor, goal: Tensor) -> Tensor:
    """Sum over rows of KL(teacher || student), from the hidden states [T, D] of both after their final norms."""
    goal = goal.to(hidden.device)
    with torch.no_grad():
        wanted = dispatch.linear(goal, teacher.unembedding.to(goal.device)).float().log_softmax(-1)
    given = student.unembed(hidden).float().log_softmax(-1)
    return (wanted.exp() * (wanted - given)).sum()


def _hidden(model: Transformer, batch: Batch) -> Tensor:
    positions = None if batch.positions is None else batch.positions.to(model.device)
    return model.features(batch.tokens.to(model.device), positions=positions).hidden


@contextlib.contextmanager
def _only(model: Transformer, chosen: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for `chosen` alone while the block runs."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for p in chosen:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


@contextlib.contextmanager
def _in_fp32(chosen: list[nn.Parameter]) -> Iterator[bool]:
    """Hold `chosen` in fp32 while the block runs, since bf16 swallows small updates; yields whether any was not."""
    before = [p.dtype for p in chosen]
    try:
        for p in chosen:
            p.data = p.data.float()
        yield any(dtype != torch.float32 for dtype in before)
    finally:
        for p, dtype in zip(chosen, before):
            p.grad = None
            p.data = p.data.to(dtype)
