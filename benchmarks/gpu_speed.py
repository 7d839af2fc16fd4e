"""How fast the kernels are, each beside what the machine allows: bytes over copy bandwidth, operations over a GEMM's rate.

Every time is that of a replayed CUDA graph, median of several, on buffers that do not fit the cache: at one token an
expert layer reads 53 MB, about the size of an H200's L2, so graphs walk through disjoint sets of experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_weights import DEVICE, Layer, random_model, routing_over
from torch import Tensor

from xmoe.kernels.cuda.decode_attention import decode_attention
from xmoe.kernels.cuda.decode_step import DecodeStep
from xmoe.kernels.cuda.experts import sort_for
from xmoe.kernels.cuda.flash_attention import flash_attention
from xmoe.kernels.cuda.norm import Experts, add_and_norm, combine
from xmoe.kernels.cuda.routing import choose_and_sort
from xmoe.model.config import preset
from xmoe.model.rope import concentration, inverse_frequencies, rope_tables

Results = dict[str, Any]


def graph_seconds(run: Callable[[], Any], calls: int = 1, repeats: int = 7) -> float:
    """Seconds of one call of `run`, which makes `calls` of what is measured: graph replays between two events, median."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return event_seconds(graph.replay, repeats) / calls


def event_seconds(run: Callable[[], Any], repeats: int = 7) -> float:
    """Seconds of one call of `run`: enough calls between two events to last 20 ms, median of `repeats`."""
    run()
    once = _between(run, 1)
    count = max(1, min(200, int(0.02 / max(once, 1e-7))))
    return statistics.median(_between(run, count) / count for _ in range(repeats))


def _between(run: Callable[[], Any], count: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def ceilings(_: Results) -> Results:
    """What this machine reaches with a large copy and a large bf16 product of random numbers: the rooflines below."""
    source = torch.randn(2**29, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = event_seconds(lambda: target.copy_(source))
    a = source[: 8192 * 8192].view(8192, 8192)
    product = event_seconds(lambda: a @ a.T)
    bandwidth, rate = 2 * source.nbytes / copy / 1e9, 2 * 8192**3 / product / 1e12
    rows = [{"what": "copy", "GB/s": bandwidth}, {"what": "bf16 product 8192^3", "TFLOP/s": rate}]
    return {"rows": rows, "bandwidth": bandwidth, "rate": rate}


def _ceiling(results: Results) -> tuple[float, float]:
    """Copy bandwidth in bytes/s and product rate in FLOP/s, measured now if no earlier section did."""
    found = results.get("ceilings") or {}
    if "bandwidth" not in found:
        found = ceilings({})
    return found["bandwidth"] * 1e9, found["rate"] * 1e12


def expert_kernels(results: Results) -> Results:
    """gate_up and down at gpt-oss-20b's and -120b's shapes, T from 1 to 4096: time, bandwidth, rate, share of the floor."""
    bandwidth, rate = _ceiling(results)
    rows = []
    for name, E in (("20b", 32), ("120b", 128)):
        layer = Layer(E)
        for T in (1, 2, 4, 8, 16, 64, 512, 4096):
            rows += [{"model": name, "T": T} | row for row in _expert_rows(layer, T, bandwidth, rate)]
        del layer
        torch.cuda.empty_cache()
    return {
        "rows": rows,
        "notes": ["`of floor` is the larger of bytes / copy bandwidth and FLOP / GEMM rate, over the time."],
    }


def _expert_rows(layer: Layer, T: int, bandwidth: float, rate: float) -> list[Results]:
    sets = routing_over(layer.num_experts, T)
    x = torch.randn(T, layer.D, device=DEVICE, dtype=torch.float16)
    sorted_sets = [sort_for(indices, layer.num_experts, layer.gate_up) for indices in sets]
    distinct = statistics.mean(len(indices.unique()) for indices in sets)
    hidden = [layer.first(x, rows) for rows in sorted_sets]
    weights = torch.full((T, 4), 0.25, device=DEVICE)
    bf16 = x.bfloat16()
    runs = {
        "gate_up": (lambda: [layer.first(x, rows) for rows in sorted_sets], 2 * layer.F, layer.D),
        "down": (lambda: [layer.second(h.active, rows) for h, rows in zip(hidden, sorted_sets)], layer.D, layer.F),
        "layer": (lambda: [layer.all(bf16, indices, weights) for indices in sets], 3 * layer.F, layer.D),
    }
    out = []
    for name, (run, N, K) in runs.items():
        seconds = graph_seconds(run, len(sets))
        # The weights that are read, and what comes and goes beside them.
        size = distinct * N * K * (0.5 + 1 / 32) + T * 4 * 2 * (N + K)
        flops = 2 * T * 4 * N * K
        floor = max(size / bandwidth, flops / rate)
        out.append(
            {
                "kernel": name,
                "experts": distinct,
                "µs": seconds * 1e6,
                "GB/s": size / seconds / 1e9,
                "TFLOP/s": flops / seconds / 1e12,
                "of floor": floor / seconds,
            }
        )
    return out


def small_kernels(results: Results) -> Results:
    """Everything between the products of a decode step, and prefill attention, one by one."""
    bandwidth, rate = _ceiling(results)
    H, G, Dh, D, E = 64, 8, 64, 2880, 32
    rows = []

    def add(name: str, run: Callable[[], Any], size: float, flops: float = 0.0) -> None:
        seconds = graph_seconds(run)
        floor = max(size / bandwidth, flops / rate)
        rows.append({"kernel": name, "µs": seconds * 1e6, "GB/s": size / seconds / 1e9, "of floor": floor / seconds})

    for T in (1, 64):
        logits = torch.randn(T, E, device=DEVICE)
        add(f"route T={T}", lambda logits=logits: choose_and_sort(logits, 4, 16), logits.nbytes)
        residual, weight = torch.randn(T, D, device=DEVICE).bfloat16(), torch.ones(D, device=DEVICE).bfloat16()
        indices = torch.randint(0, E, (T, 4), device=DEVICE)
        parts = Experts(torch.randn(2, T * 4, D, device=DEVICE), indices, torch.rand(T, 4, device=DEVICE))
        size = parts.partial.nbytes + 3 * residual.nbytes
        add(f"add + norm T={T}", lambda r=residual, w=weight, p=parts: add_and_norm(r, w, 1e-5, experts=p), size)
        add(f"combine T={T}", lambda p=parts: combine(p, torch.bfloat16), size)
    for B, L in ((1, 1024), (1, 131072), (64, 1024)):
        q = torch.randn(B, 1, H, Dh, device=DEVICE).bfloat16()
        keys, values = torch.randn(2, B, L, G, Dh, device=DEVICE, dtype=torch.bfloat16)
        sinks, lengths = torch.zeros(H, device=DEVICE), torch.full((B,), L - 1, device=DEVICE)
        add(
            f"decode attention B={B} L={L}",
            lambda q=q, k=keys, v=values, s=sinks, n=lengths: decode_attention(q, k, v, s, lengths=n),
            keys.nbytes + values.nbytes,
        )
    for S, window in ((4096, None), (4096, 128)):
        q = torch.randn(1, S, H, Dh, device=DEVICE).bfloat16()
        keys, values = torch.randn(2, 1, S, G, Dh, device=DEVICE, dtype=torch.bfloat16)
        sinks = torch.zeros(H, device=DEVICE)
        seen = S * (S + 1) / 2 if window is None else S * window
        with torch.no_grad():
            add(
                f"flash forward S={S} window={window}",
                lambda q=q, k=keys, v=values, s=sinks, w=window: flash_attention(q, k, v, s, window=w),
                2 * q.nbytes + keys.nbytes + values.nbytes,
                4 * seen * H * Dh,
            )
    return {"rows": rows}


def tables(config, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [length, Dh/2] of this model on the device."""
    positions = torch.arange(length, device=DEVICE).unsqueeze(0)
    cos, sin = rope_tables(positions, inverse_frequencies(config).to(DEVICE), concentration(config))
    return cos[0].contiguous(), sin[0].contiguous()


def decode(results: Results) -> Results:
    """gpt-oss-20b with random weights, 1024 tokens behind it: one captured step at batch 1, 4, 16, 64."""
    bandwidth, _ = _ceiling(results)
    config = preset("gpt_oss_20b")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = random_model(config)
    weights = torch.cuda.memory_allocated() - before
    rows, context = [], 1024
    rope = tables(config, context + 512)
    for B in (1, 4, 16, 64):
        step = DecodeStep(model, B, context + 512, rope)
        step.positions.fill_(context)
        step.length = context
        for cache in (*step.keys, *step.values):
            cache.normal_()
        step.tokens.copy_(torch.randint(0, config.vocab_size, (B,)))
        torch.cuda.reset_peak_memory_stats()
        step.capture()
        seconds = event_seconds(lambda step=step: step.graph.replay())
        peak = torch.cuda.max_memory_allocated() - before
        size = _bytes_per_step(model, B, context)
        rows.append(
            {
                "batch": B,
                "ms a step": seconds * 1e3,
                "tokens/s": B / seconds,
                "GB a step": size / 1e9,
                "ceiling tokens/s": B * bandwidth / size,
                "of ceiling": size / bandwidth / seconds,
                "peak GiB": peak / 2**30,
                "planned GiB": (weights + step.cache_bytes) / 2**30,
            }
        )
        del step
        torch.cuda.empty_cache()
    notes = [
        f"Weights take {weights / 2**30:.2f} GiB. The ceiling is bytes a step (uniform routing) at copy bandwidth."
    ]
    return {"rows": rows, "notes": notes}


def _bytes_per_step(model, batch: int, context: int) -> float:
    """Bytes a decode step must read: weights of used experts, all others once, the cache of each sequence."""
    config = model.config
    E, K = config.num_experts, config.num_experts_per_tok
    used = E * (1 - (1 - K / E) ** batch)
    size = model.unembedding.nbytes
    for layer, block in enumerate(model.blocks):
        window = config.window(layer)
        keys = context if window is None else min(context, window)
        size += batch * keys * 2 * config.num_key_value_heads * config.head_dim * 2
        stack = block.moe.experts
        size += (stack.gate_up.nbytes + stack.down.nbytes) * used / E
        size += sum(p.nbytes for p in (*block.attn.parameters(), *block.moe.router.parameters()))
    return size


def prefill(_: Results) -> Results:
    """gpt-oss-20b with random weights, one prompt of 512 and of 4096 tokens, through the model's own forward pass."""
    from xmoe.kernels import dispatch

    config = preset("gpt_oss_20b")
    model = random_model(config)
    rows = []
    for S in (512, 4096):
        tokens = torch.randint(0, config.vocab_size, (1, S), device=DEVICE)
        with torch.no_grad():
            seconds = event_seconds(
                lambda tokens=tokens: model.unembed(model.features(tokens).hidden[:, -1]), repeats=3
            )
        # Active weights without embedding and head, twice, a token; attention beside it.
        active = config.active_parameter_count() - 2 * config.vocab_size * config.hidden_size
        rows.append(
            {
                "S": S,
                "ms": seconds * 1e3,
                "tokens/s": S / seconds,
                "TFLOP/s of weights": 2 * active * S / seconds / 1e12,
            }
        )
    return {"rows": rows, "notes": [dispatch.describe(DEVICE, torch.bfloat16)]}
