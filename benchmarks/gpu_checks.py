"""Is every kernel right on this device? Exact gpt-oss shapes against fp32, and twice the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_weights import DEVICE, SWIGLU, Layer, random_routing
from torch import Tensor

from xmoe.kernels import reference
from xmoe.kernels.cuda import backend as triton_backend
from xmoe.kernels.cuda.decode_attention import decode_attention
from xmoe.kernels.cuda.decode_step import DecodeStep
from xmoe.kernels.cuda.experts import ExpertsFunction
from xmoe.kernels.cuda.norm import Experts, combine
from xmoe.kernels.cuda.repack import unpack
from xmoe.kernels.cuda.routing import choose_and_sort, map_tiles

Results = dict[str, Any]
TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)
CLOSE = 2e-3  # of fp32, in the norm, for outputs that are not rounded to bf16
ROUNDED = 4e-3  # for outputs, or operands, that bf16 has rounded: its half step is 3.9e-3


def correctness(_: Results) -> Results:
    """All of it; a row a check."""
    precise = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    try:
        rows = [row for check in (_packed, _routing, _attention, _pointwise, _training, _decode) for row in check()]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = precise
    return {"rows": rows}


def _row(what: str, out: Tensor, expected: Tensor, limit: float, again: Tensor | None = None) -> Results:
    out, expected = out.detach().float(), expected.detach().float()
    error = float((out - expected).norm() / expected.norm().clamp(min=1e-30))
    same = None if again is None else bool(torch.equal(out, again.detach().float()))
    return {"what": what, "error": error, "limit": limit, "repeats": same, "ok": error <= limit and same is not False}


def _twice(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    return run(), run()


def _packed() -> list[Results]:
    rows = []
    for name, E in (("20b", 32), ("120b", 128)):
        layer = Layer(E)
        exact = all(
            torch.equal(mine, theirs)
            for packed, held in ((layer.gate_up, layer.up_bytes), (layer.down, layer.down_bytes))
            for mine, theirs in zip(unpack(packed), held)
        )
        rows.append({"what": f"{name} unpack(repack)", "ok": exact})
        dense = layer.dense()
        for T in TOKENS:
            x, indices = torch.randn(T, layer.D, device=DEVICE).bfloat16(), random_routing(E, T)
            weights = torch.rand(T, 4, device=DEVICE).softmax(-1)
            expected, lengths = reference.experts(x.float(), indices, weights, *dense, norms=True)
            run, other = _twice(lambda layer=layer, x=x, i=indices, w=weights: layer.all(x, i, w))
            rows.append(_row(f"{name} experts T={T}", run, expected, CLOSE, other))
            # The same before rounding to bf16: each product by itself.
            half = x.half()
            found = choose_and_sort(torch.randn(T, E, device=DEVICE), 4, 16)
            hidden = layer.first(half, found[2])
            partial = layer.second(hidden.active, found[2])
            y, norms = combine(Experts(partial, found[0], found[1]), torch.float32, norms=True)
            expected, lengths = reference.experts(half.float(), found[0], found[1], *dense, norms=True)
            rows.append(_row(f"{name} experts in fp32 out T={T}", y, expected, 1e-3))
            rows.append(_row(f"{name} expert lengths T={T}", norms, lengths, 1e-3))
        del layer, dense
        torch.cuda.empty_cache()
    return rows


def _routing() -> list[Results]:
    rows = []
    for E in (32, 128):
        for T in (1, 64, 4096, 16384):
            logits = torch.randn(T, E, device=DEVICE)
            indices, weights, found = choose_and_sort(logits, 4, 16)
            values, expected = logits.topk(4, dim=-1)
            order = expected.flatten().argsort(stable=True)
            counts = torch.bincount(expected.flatten(), minlength=E)
            offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
            same = torch.equal(indices, expected) and torch.equal(found.order.long(), order)
            same = same and torch.equal(found.offsets.long(), offsets)
            used = int((map_tiles(found, 16).expert >= 0).sum())
            same = same and used == int(((counts + 15) // 16).sum())
            close = torch.allclose(weights, values.softmax(-1), atol=1e-6)
            rows.append({"what": f"routing E={E} T={T}", "ok": bool(same and close)})
    return rows


def _attention() -> list[Results]:
    rows, (H, G, Dh) = [], (64, 8, 64)
    for S, window in ((1024, None), (1024, 128), (1000, 128)):
        inputs = [torch.randn(1, S, n, Dh, device=DEVICE).bfloat16().requires_grad_() for n in (H, G, G)]
        sinks = torch.randn(H, device=DEVICE).requires_grad_()
        exact = [t.detach().float().requires_grad_() for t in (*inputs, sinks)]
        dout = torch.randn(1, S, H, Dh, device=DEVICE).bfloat16()

        def run(inputs=inputs, sinks=sinks, window=window):
            return triton_backend.attention(*inputs, sinks, window=window)

        out, again = _twice(run)
        expected = reference.attention(*exact, window=window)
        rows.append(_row(f"attention S={S} window={window}", out, expected, ROUNDED, again))
        got, repeat = (torch.autograd.grad(o, (*inputs, sinks), dout) for o in (out, again))
        wanted = torch.autograd.grad(expected, exact, dout.float())
        for name, g, w, r in zip(("dq", "dk", "dv", "dsinks"), got, wanted, repeat):
            rows.append(_row(f"attention {name} S={S} window={window}", g, w, 3 * ROUNDED, r))
    for B, L in ((4, 1024), (4, 128), (1, 32768)):
        q = torch.randn(B, 1, H, Dh, device=DEVICE).bfloat16()
        keys, values = torch.randn(2, B, L, G, Dh, device=DEVICE).bfloat16()
        sinks = torch.randn(H, device=DEVICE)
        lengths = torch.randint(0, L, (B,), device=DEVICE)
        out, again = _twice(lambda q=q, k=keys, v=values, s=sinks, n=lengths: decode_attention(q, k, v, s, lengths=n))
        k_pos = torch.arange(L, device=DEVICE).expand(B, L)
        exact = q.float(), keys.float(), values.float(), sinks
        expected = reference.attention(*exact, q_pos=lengths.unsqueeze(1), k_pos=k_pos)
        rows.append(_row(f"decode attention B={B} L={L}", out, expected, ROUNDED, again))
    return rows


def _pointwise() -> list[Results]:
    rows = []
    for T in (1, 64, 4096):
        x, weight = torch.randn(T, 2880, device=DEVICE).bfloat16(), torch.randn(2880, device=DEVICE).bfloat16()
        exact = [x.float().requires_grad_(), weight.float().requires_grad_()]
        mine = [x.requires_grad_(), weight.requires_grad_()]
        out, again = _twice(lambda mine=mine: triton_backend.rms_norm(*mine, 1e-5))
        expected = reference.rms_norm(*exact, 1e-5)
        rows.append(_row(f"rms_norm T={T}", out, expected, ROUNDED, again))
        dy = torch.randn_like(x)
        for name, g, w in zip(
            ("dx", "dweight"), torch.autograd.grad(out, mine, dy), torch.autograd.grad(expected, exact, dy.float())
        ):
            rows.append(_row(f"rms_norm {name} T={T}", g, w, ROUNDED))
        heads, angle = torch.randn(1, T, 72, 64, device=DEVICE).bfloat16(), torch.randn(1, T, 32, device=DEVICE)
        tables = angle.cos(), angle.sin()
        expected = reference.rope(heads.float(), *tables)
        rows.append(_row(f"rope T={T}", triton_backend.rope(heads, *tables), expected, ROUNDED))
    return rows


def _training() -> list[Results]:
    """Dense bf16 and packed experts, forward and all gradients, at 20b's width."""
    rows, E, D, _F, T = [], 32, 2880, 2880, 512
    layer = Layer(E)
    exact = [t.requires_grad_() for t in layer.dense()]
    indices = random_routing(E, T)
    x, dy = (torch.randn(T, D, device=DEVICE).bfloat16() for _ in range(2))
    weights = torch.rand(T, 4, device=DEVICE).softmax(-1)
    truth = [x.float().requires_grad_(), weights.clone().requires_grad_(), *exact]
    expected, _ = reference.experts(truth[0], indices, *truth[1:])
    wanted = torch.autograd.grad(expected, truth, dy.float())
    names = ("dx", "dweights", "dgate_up", "dgate_up_bias", "ddown", "ddown_bias")
    # Weights of e2m1 times a power of two are exact in bf16, so the same numbers serve dense and packed.
    mine = [x.requires_grad_(), weights.requires_grad_(), *(t.detach().bfloat16().requires_grad_() for t in exact)]
    out, again = (ExpertsFunction.apply(*mine, indices, *SWIGLU.values(), False)[0] for _ in range(2))
    rows.append(_row("dense experts", out, expected, 2 * ROUNDED, again))
    got, repeat = (torch.autograd.grad(o, mine, dy) for o in (out, again))
    rows += [_row(f"dense {n}", g, w, 3 * ROUNDED, r) for n, g, w, r in zip(names, got, wanted, repeat)]
    packed = layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias
    out, again = (ExpertsFunction.apply(*mine[:2], *packed, indices, *SWIGLU.values(), False)[0] for _ in range(2))
    rows.append(_row("packed experts", out, expected, ROUNDED, again))
    got, repeat = (torch.autograd.grad(o, mine[:2], dy) for o in (out, again))
    rows += [_row(f"packed {n}", g, w, 3 * ROUNDED, r) for n, g, w, r in zip(names[:2], got, wanted, repeat)]
    return rows


def _decode() -> list[Results]:
    """A captured step after a prompt beside the model's own forward pass, on two layers of gpt-oss-20b's width."""
    import dataclasses

    from gpu_speed import tables
    from gpu_weights import random_model

    from xmoe.kernels import dispatch
    from xmoe.model.config import preset

    layers = ("sliding_attention", "full_attention")
    config = dataclasses.replace(preset("gpt_oss_20b"), num_hidden_layers=2, layer_types=layers, vocab_size=4096)
    model, prompt = random_model(config), torch.randint(0, 4096, (3, 200), device=DEVICE)
    step = DecodeStep(model, 3, 256, tables(config, 256))
    step.prefill(prompt)
    step.capture()
    chosen, logits = [step.tokens.clone()], []
    for _ in range(4):
        logits.append(step.step().clone())
        chosen.append(step.tokens.clone())
    whole = torch.cat((prompt, torch.stack(chosen[:-1], 1)), 1)
    with torch.no_grad(), dispatch.use("portable"):
        expected = model(whole).logits[:, 200:]
    # bf16 twice over two layers, summed in another order: near-equal router logits may choose other experts.
    return [_row("captured decode step, 2 layers", torch.stack(logits, 1), expected, 5e-2)]
