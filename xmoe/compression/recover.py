"""Win quality back after a cut: distil the uncut model into the routers alone, the experts, or all that is left.

The student learns to give the next-token distribution of the teacher on any text, so no labels are needed:

    loss = mean over tokens of KL(teacher || student) = sum_v p_v (log p_v - log q_v)

Training the routers alone ("Router KD", arXiv 2603.02217) moves 2.2 million parameters on gpt-oss-20b: after a cut they
still send tokens by what the missing experts would have done. Experts may stay packed for that.
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
from xmoe.errors import ConfigError, DataError
from xmoe.kernels import dispatch
from xmoe.model.transformer import Transformer
from xmoe.quantization.packed import PackedWeight

TRAINABLE = ("routers", "experts", "all")
LEARNING_RATE = {"routers": 3e-3, "experts": 5e-4, "all": 3e-4}
"""Adam's, where none is given."""

_CHUNK = 1024  # tokens whose [., V] logits are held at a time


class Recovery(NamedTuple):
    """losses: KL in nats a token, one a step. parameters: how many were trained. tokens: how many were seen."""

    losses: list[float]
    parameters: int
    tokens: int


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
    held in fp32 meanwhile and return to their type at the end.

    Args:
        batches: token ids [B, S], or pairs with a mask, as for recording; kept in memory.
        train: `routers`, `experts` (routers too, since what they choose among changes) or `all`.
        lr: peak learning rate; None is :data:`LEARNING_RATE`.
        on_step: called with the step's number and its loss.

    Raises:
        ConfigError: experts that are packed are to be trained; models of different vocabularies. DataError: no tokens.
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
    chosen = trained_parameters(student, train)
    optimizer_lr = LEARNING_RATE[train] if lr is None else lr
    was_training, seen, losses = student.training, 0, []
    teacher_was_training = teacher.training
    student.train()
    teacher.eval()
    with _only(student, chosen), _in_fp32(chosen) as autocast:
        optimizer = torch.optim.AdamW(chosen, lr=optimizer_lr, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, steps))
        bar = tqdm(itertools.islice(itertools.cycle(data), steps), total=steps, desc="recovering", disable=None)
        for step, batch in enumerate(bar):
            with torch.no_grad():
                goal = _hidden(teacher, batch)
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
    student.train(was_training)
    teacher.train(teacher_was_training)
    return Recovery(losses, sum(p.numel() for p in chosen), seen)


def trained_parameters(model: Transformer, train: str) -> list[nn.Parameter]:
    """What `train` names: routers; routers and experts; or everything."""
    if train != "routers" and any(isinstance(m, PackedWeight) for m in model.modules()):
        raise ConfigError(
            f"the experts are packed and cannot be trained; train the routers, or load them with experts='dense' to "
            f"train {train}"
        )
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
    flat, goal = hidden.reshape(-1, hidden.shape[-1]), goal.reshape(-1, goal.shape[-1]).to(hidden.device)
    if mask is not None:
        flat, goal = flat[mask.reshape(-1)], goal[mask.reshape(-1)]
    leaf = flat.detach().requires_grad_()
    total = 0.0
    for start in range(0, leaf.shape[0], _CHUNK):
        part = slice(start, start + _CHUNK)
        with torch.no_grad():
            wanted = dispatch.linear(goal[part], teacher.unembedding.to(goal.device)).float().log_softmax(-1)
        given = student.unembed(leaf[part]).float().log_softmax(-1)
        loss = (wanted.exp() * (wanted - given)).sum() / leaf.shape[0]
        loss.backward()
        total += float(loss.detach())
    flat.backward(leaf.grad)
    return total


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
