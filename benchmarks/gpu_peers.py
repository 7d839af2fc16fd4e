"""One expert layer beside its peers on the same machine: torch's grouped_mm, transformers, ScatterMoE, triton_kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_speed import event_seconds, graph_seconds
from gpu_weights import DEVICE, SWIGLU, Layer, random_routing, routing_over
from torch import Tensor

from xmoe.kernels import grouped_mm
from xmoe.kernels.cuda.experts import ExpertsFunction

Results = dict[str, Any]
T, D, WIDTH, E, K = 16384, 2880, 2880, 32, 4  # the training layer of the goal
FLOPS = 3 * 2 * T * K * (3 * D * WIDTH)  # forward, and twice that backward


def _dense() -> list[Tensor]:
    shapes = (E, 2 * WIDTH, D), (E, 2 * WIDTH), (E, D, WIDTH), (E, D)
    return [torch.randn(s, device=DEVICE).mul_(0.02).bfloat16().requires_grad_() for s in shapes]


def training_layer(_: Results) -> Results:
    """d 2880, n 2880, 32 experts, k 4, 16384 tokens, bf16: forward and backward, time and activation memory."""
    dense = _dense()
    x = torch.randn(T, D, device=DEVICE).bfloat16().requires_grad_()
    indices, dy = random_routing(E, T), torch.randn(T, D, device=DEVICE).bfloat16()
    weights = torch.rand(T, K, device=DEVICE).softmax(-1).requires_grad_()
    inputs = (x, weights, *dense)

    def ours() -> Tensor:
        return ExpertsFunction.apply(*inputs, indices, *SWIGLU.values(), False)[0]

    rows = [_trained("xmoe", ours, inputs, dy)]
    peers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "torch grouped_mm": lambda: lambda: grouped_mm.experts(x, indices, weights, *dense)[0],
        "transformers gpt-oss": lambda: _transformers(x, indices, weights),
        "ScatterMoE GLU": lambda: _scattermoe(x, indices, weights),
    }
    for name, make in peers.items():
        try:
            run = make()
            row = _trained(name, run, _leaves(run, inputs), dy)
        except Exception as error:  # a peer that is not here, or not this version, is a fact to write down
            row = {"who": name, "why not": f"{type(error).__name__}: {error}"[:300]}
        rows.append(row)
        torch.cuda.empty_cache()
    for row in rows:
        if "ms" in row:
            row["times ours"] = row["ms"] / rows[0]["ms"]
    formula = (2 * T * D + 4 * T * K * WIDTH) / 2**30
    return {"rows": rows, "notes": [f"Activations by formula, 2Td + 4Tkn bytes: {formula:.2f} GiB."]}


def _leaves(run: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return getattr(run, "leaves", inputs)


def _trained(name: str, run: Callable[[], Tensor], leaves: tuple[Tensor, ...], dy: Tensor) -> Results:
    def both() -> None:
        torch.autograd.grad(run(), leaves, dy, allow_unused=True)

    both()
    before = torch.cuda.memory_allocated()
    out = run()
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    del out
    torch.cuda.reset_peak_memory_stats()
    forward, whole = event_seconds(run, 5), event_seconds(both, 5)
    peak = torch.cuda.max_memory_allocated() - before
    return {
        "who": name,
        "ms": whole * 1e3,
        "forward ms": forward * 1e3,
        "TFLOP/s": FLOPS / whole / 1e12,
        "kept GiB": kept / 2**30,
        "peak GiB": peak / 2**30,
    }


def _transformers(x: Tensor, indices: Tensor, weights: Tensor) -> Callable[[], Tensor]:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(
        hidden_size=D, intermediate_size=WIDTH, num_local_experts=E, num_experts_per_tok=K, num_hidden_layers=1
    )
    config._experts_implementation = "grouped_mm"
    with torch.device(DEVICE):
        module = GptOssExperts(config).bfloat16()
    for parameter in module.parameters():
        parameter.data.normal_(std=0.02)

    def run() -> Tensor:
        return module(x, indices, weights.bfloat16()).view(T, D)

    run.leaves = (x, weights, *module.parameters())
    return run


def _scattermoe(x: Tensor, indices: Tensor, weights: Tensor) -> Callable[[], Tensor]:
    from scattermoe.mlp import GLUMLP

    module = GLUMLP(input_size=D, hidden_size=WIDTH, num_experts=E, top_k=K, activation=torch.nn.SiLU())
    module = module.to(DEVICE).bfloat16()

    def run() -> Tensor:
        return module(x, weights.bfloat16(), indices)

    run.leaves = (x, weights, *module.parameters())
    return run


def packed_training(_: Results) -> Results:
    """Forward and dX through frozen MXFP4 experts, beside the same products with bf16 experts: what adapters pay."""
    layer, rows = Layer(E), []
    dense = [t.detach() for t in _dense()]
    for tokens in (2048, 16384):
        x = torch.randn(tokens, D, device=DEVICE).bfloat16().requires_grad_()
        indices = random_routing(E, tokens)
        weights, dy = torch.rand(tokens, K, device=DEVICE).softmax(-1), torch.randn_like(x)
        packed = layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias
        times = []
        for matrices in (packed, dense):

            def both(matrices=matrices, x=x, weights=weights, indices=indices, dy=dy):
                y = ExpertsFunction.apply(x, weights, *matrices, indices, *SWIGLU.values(), False)[0]
                torch.autograd.grad(y, x, dy)

            times.append(event_seconds(both, 5))
        names = {"T": tokens, "packed ms": times[0] * 1e3, "bf16 experts ms": times[1] * 1e3}
        rows.append(names | {"packed / bf16": times[0] / times[1], "ok": times[0] <= 1.5 * times[1]})
    return {"rows": rows, "notes": ["The goal is at most 1.5 times the time of bf16 experts."]}


def packed_peers(_: Results) -> Results:
    """One packed layer at 1, 16 and 512 tokens beside triton_kernels' own MXFP4 products, where they can be imported."""
    layer, rows = Layer(E), []
    for tokens in (1, 16, 512):
        sets = routing_over(E, tokens)
        x, weights = torch.randn(tokens, D, device=DEVICE).bfloat16(), torch.full((tokens, K), 0.25, device=DEVICE)

        def ours(sets=sets, x=x, weights=weights):
            return [layer.all(x, indices, weights) for indices in sets]

        row = {"T": tokens, "xmoe µs": graph_seconds(ours, len(sets)) * 1e6}
        try:
            run = _triton_kernels(layer, x, sets[0])
            row["triton_kernels µs"] = event_seconds(run, 5) * 1e6
        except Exception as error:  # as above
            row["triton_kernels"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
    return {"rows": rows, "notes": ["xmoe's time includes sort and combine; triton_kernels' is of its two products."]}


def _triton_kernels(layer: Layer, x: Tensor, indices: Tensor) -> Callable[[], Tensor]:
    from triton_kernels.matmul_ogs import FlexCtx, FnSpecs, FusedActivation, PrecisionConfig, matmul_ogs
    from triton_kernels.numerics import InFlexData
    from triton_kernels.routing import routing
    from triton_kernels.swiglu import swiglu_fn
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    def swizzled(held: tuple[Tensor, Tensor]):
        blocks, scales = held
        values, options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        codes = wrap_torch_tensor(blocks.flatten(2).transpose(-2, -1), dtype=FP4)
        return (
            convert_layout(codes, values, **options),
            convert_layout(wrap_torch_tensor(scales.transpose(-2, -1)), layout.StridedLayout),
        )

    (up, up_scale), (down, down_scale) = swizzled(layer.up_bytes), swizzled(layer.down_bytes)
    first = PrecisionConfig(weight_scale=up_scale, flex_ctx=FlexCtx(rhs_data=InFlexData()))
    second = PrecisionConfig(weight_scale=down_scale, flex_ctx=FlexCtx(rhs_data=InFlexData()))
    logits = torch.full((x.shape[0], E), -9.0, device=DEVICE, dtype=torch.bfloat16).scatter(1, indices, 0.0)
    data, gather, scatter = routing(logits, K, simulated_ep=1)
    act = FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (1.702, 7.0), 2)
    biases = layer.gate_up_bias.float(), layer.down_bias.float()

    def run() -> Tensor:
        hidden = matmul_ogs(x, up, biases[0], data, gather_indx=gather, precision_config=first, fused_activation=act)
        gates = data.gate_scal
        return matmul_ogs(hidden, down, biases[1], data, scatter_indx=scatter, precision_config=second, gammas=gates)

    return run
