"""Kernels compiled to machine code without a GPU, exactly as their wrappers would launch them at gpt-oss shapes.

Asserted: no spills, shared memory within the architecture's limit, matrix instructions present on sm_90, and instructions
a weight within the budget below. An H200 can issue 4.13 lane instructions a weight at 4.3 TB/s, so a kernel above that can
not reach its bandwidth.
"""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; its kernels are used on CUDA machines only")
if sys.platform != "linux":
    pytest.skip("Triton's compiler is built for Linux only", allow_module_level=True)

import triton

from xmoe.kernels.cuda import tiles
from xmoe.kernels.cuda.compile_proof import SHARED_LIMIT, Proof, prove
from xmoe.kernels.cuda.decode_attention import decode_attention
from xmoe.kernels.cuda.experts import ExpertsFunction, experts_forward
from xmoe.kernels.cuda.flash_attention import flash_attention
from xmoe.kernels.cuda.launch import INTERPRETED, Launch, record
from xmoe.kernels.cuda.norm import Experts, add_and_norm, rms_norm
from xmoe.kernels.cuda.repack import Repacked
from xmoe.kernels.cuda.rope import rope, rope_into_cache
from xmoe.kernels.cuda.routing import choose_and_sort

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiling needs Triton's own functions, not interpreted ones")

D, F, K = 2880, 2880, 4  # gpt-oss
H, G, DH = 64, 8, 64
# Lane instructions a weight in the main loop on sm_90, measured with Triton 3.9 and 3.6, plus a tenth.
BUDGET = {
    ("mxfp4_gate_up", 0): 3.3,
    ("mxfp4_gate_up", 1): 3.3,
    ("mxfp4_gate_up", 2): 3.6,
    ("mxfp4_gate_up", 3): 4.8,
    ("mxfp4_down", 0): 3.3,
    ("mxfp4_down", 1): 3.3,
    ("mxfp4_down", 2): 3.6,
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Compile for real, and leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
        yield


def empty(*shape, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def packed(E: int, N: int, K: int, paired: bool, exact: bool = True) -> Repacked:
    codes = empty(E, triton.cdiv(N, 64), triton.cdiv(K, 128), 4096, dtype=torch.uint8)
    scales = empty(*codes.shape[:3], 64, 4, dtype=torch.uint8)
    none = empty(0, 3, dtype=torch.int64), empty(0, dtype=torch.uint8)
    return Repacked(codes, scales, (E, N, K), paired, exact, *none)


def expert_launches(T: int, E: int = 32, *, is_packed=True, exact=True, train=False, overrides=None) -> list[Launch]:
    """What one expert layer launches for T tokens."""
    if is_packed:
        matrices = packed(E, 2 * F, D, True, exact), packed(E, D, F, False, exact)
    else:
        matrices = empty(E, 2 * F, D).requires_grad_(), empty(E, D, F).requires_grad_()
    biases = empty(E, 2 * F), empty(E, D)
    indices, weights = empty(T, K, dtype=torch.int64), empty(T, K, dtype=torch.float32).requires_grad_(train)
    biases = tuple(bias.requires_grad_(train and not is_packed) for bias in biases)
    x = empty(T, D).requires_grad_(train)
    with record() as launches, tiles.override(overrides or {}):
        if train:
            inputs = x, weights, matrices[0], biases[0], matrices[1], biases[1]
            y, _ = ExpertsFunction.apply(*inputs, indices, 7.0, 1.702, False)
            torch.autograd.backward(y, empty(T, D))
        else:
            inputs = matrices[0], biases[0], matrices[1], biases[1]
            experts_forward(x, indices, weights, *inputs, limit=7.0, alpha=1.702)
    return launches


def named(launches: list[Launch], name: str) -> list[Launch]:
    found = [launch for launch in launches if launch.kernel.__name__ == name]
    assert found, f"no {name} among {[launch.kernel.__name__ for launch in launches]}"
    return found


def sound(launch: Launch, arch: int = 90) -> Proof:
    """Compiled without a spill and within shared memory."""
    proof = prove(launch, arch)
    what = f"{launch.kernel.__name__} on sm_{arch}"
    assert proof.stack == 0, f"{what} spills {proof.stack} bytes a thread"
    assert not proof.opcodes["LDL"] and not proof.opcodes["STL"], f"{what} uses local memory"
    assert proof.shared <= SHARED_LIMIT[arch], f"{what} needs {proof.shared} bytes of shared memory"
    return proof


@pytest.mark.parametrize("kernel, entry", list(BUDGET))
def test_packed_products_on_hopper(kernel, entry):
    """Every shipped tile: wgmma with the decoded weight as its register operand, within the instruction budget."""
    tile = tiles.entries()[kernel][entry]
    T = {8: 1, 24: 128, 96: 512, None: 4096}[tile["rows"]]
    launches = named(expert_launches(T), "packed_rows_kernel")
    launch = launches[0 if kernel == "mxfp4_gate_up" else 1]
    assert launch.arguments["BM"] == tile["BM"] and launch.arguments["BN"] == tile["BN"]
    proof = sound(launch)
    assert "wgmma.mma_async" in proof.ptx
    assert proof.loop_opcodes["LDGSTS"], "weights are not fetched ahead of their use"
    assert not proof.loop_opcodes["STS"], "decoded weights pass through shared memory"
    spent = proof.instructions_per_weight(launch.warps, tile["BN"] * 128 * tile["KB"])
    assert spent <= BUDGET[kernel, entry], f"{spent:.2f} lane instructions a weight"


def test_the_path_for_weights_that_fp16_cannot_hold():
    for launch in named(expert_launches(1, exact=False), "packed_rows_kernel"):
        assert "wgmma.mma_async" in sound(launch).ptx


def test_input_gradient_through_packed_weights_on_hopper():
    for launch in named(expert_launches(4096, train=True), "packed_input_gradient_kernel"):
        assert "wgmma.mma_async" in sound(launch).ptx


def shipped(arch: int, entry: int) -> dict[str, dict[str, int]]:
    """One tile of each kernel, as the table for this architecture has it."""
    table = tiles.entries(f"sm_{arch}")
    return {name: {k: v for k, v in found[entry].items() if k != "rows"} for name, found in table.items()}


@pytest.mark.parametrize("arch", [80, 100, 120])
def test_packed_products_elsewhere(arch):
    """Other architectures have tiles of their own where sm_90's would spill or need too much shared memory."""
    launches = named(expert_launches(1, overrides=shipped(arch, 0)), "packed_rows_kernel")
    training = expert_launches(64, train=True, overrides=shipped(arch, -1))
    launches += named(training, "packed_rows_kernel")[:1] + named(training, "packed_input_gradient_kernel")[:1]
    for launch in launches:
        sound(launch, arch)


def test_grouped_gemm_forward_and_backward_on_hopper():
    launches = expert_launches(4096, is_packed=False, train=True)
    for name in ("grouped_rows_kernel", "grouped_weight_kernel"):
        for launch in named(launches, name):
            proof = sound(launch)
            assert "wgmma.mma_async" in proof.ptx and proof.loop_opcodes["HGMMA"] and proof.loop_opcodes["LDGSTS"]
    for name in ("swiglu_backward_kernel", "grouped_sum_kernel", "token_kernel"):
        sound(named(launches, name)[0])


@pytest.mark.parametrize("arch", [80, 100, 120])
def test_grouped_gemm_and_attention_elsewhere(arch):
    launches = expert_launches(512, is_packed=False, train=True, overrides=shipped(arch, -1))
    sound(named(launches, "grouped_rows_kernel")[0], arch)
    sound(named(launches, "grouped_weight_kernel")[0], arch)
    with record() as launches, tiles.override(shipped(arch, -1)):
        inputs = [empty(1, 512, n, DH).requires_grad_() for n in (H, G, G)]
        out = flash_attention(*inputs, empty(H).requires_grad_())
        torch.autograd.backward(out, empty(1, 512, H, DH))
    for launch in launches:
        sound(launch, arch)


@pytest.mark.parametrize("T, E", [(1, 32), (64, 128), (4096, 128)])
def test_routing(T, E):
    with record() as launches:
        choose_and_sort(empty(T, E, dtype=torch.float32), K, 16, empty(E))
    for launch in launches:
        sound(launch)


def test_attention_on_hopper():
    q, cache = empty(1, 1, H, DH), empty(1, 4096, G, DH)
    with record() as launches:
        decode_attention(q, cache, cache, empty(H), lengths=empty(1, dtype=torch.int64))
        decode_attention(
            q,
            cache,
            cache,
            empty(H),
            window=128,
            q_pos=empty(1, 1, dtype=torch.int64),
            k_pos=empty(1, 4096, dtype=torch.int64),
        )
        inputs = [empty(1, 4096, n, DH).requires_grad_() for n in (H, G, G)]
        out = flash_attention(*inputs, empty(H).requires_grad_(), window=128)
        torch.autograd.backward(out, empty(1, 4096, H, DH))
    for launch in launches:
        proof = sound(launch)
        if launch.kernel.__name__ == "forward_kernel":
            assert "wgmma.mma_async" in proof.ptx


def test_pointwise_kernels():
    T = 4
    parts = Experts(
        empty(2, T * K, D, dtype=torch.float32), empty(T, K, dtype=torch.int64), empty(T, K, dtype=torch.float32)
    )
    with record() as launches:
        add_and_norm(empty(T, D), empty(D), 1e-5, experts=parts, half=True)
        y = rms_norm(empty(T, D).requires_grad_(), empty(D).requires_grad_(), 1e-5)
        torch.autograd.backward(y, empty(T, D))
        table = empty(1, T, DH // 2, dtype=torch.float32)
        rope(empty(1, T, H + 2 * G, DH)[:, :, : H + G], table, table)
        cache = empty(T, 1024, G, DH)
        qkv, positions = empty(T, (H + 2 * G) * DH), empty(T, dtype=torch.int64)
        rope_into_cache(qkv, table[0], table[0], positions, H, cache, cache)
    assert len(launches) == 5
    for launch in launches:
        sound(launch)
