"""x W^T for 33 to 64 tokens: W is decoded to the registers of the matrix instruction, under that of the step before.

The product is taken transposed, as for few tokens, so that W is the operand which may stay in registers; but with so
many sums in a thread it is cheaper to multiply the levels by their scale, two at a time in 16 bits, than the sums.
Level and scale are rounded before their product is, and the error of a weight is 1.4 times that of rounding the exact
product once. With the scale out of the sums, they need not be waited for within a step: the compiler cuts a group of 64
into four instructions and decodes the next group while they run. For that there must be one `tl.dot` in the loop.
M tokens, N outputs, K inputs, R rank.

Instructions per weight in the main loop, for sm_90 (bfloat16, nf4, double quantization, tokens x outputs x group):
6.6 for 64x128x64 with 4 warps, as shipped (sm_80: 10.3); 7.1 for 128x128x64; 9.8 for 64x64x64, and 9.3 for 64x128x64
with 8 warps, where a thread decodes the scale of one row for 32 weights. Groups of 128 take 8.4, and W through shared
memory. Scales decoded before, by a kernel of their own, save 0.5, and x put in the order of the codes before, 0.3:
neither is worth another launch. 128x256x64 with 8 warps takes 6.9 and decodes W half as often, but fills a
processor's registers with one program and spills on sm_80.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.decode import block_scale, decodable, decoded_scaled, places, tile
from kernels.epilogue import complete
from kernels.launch import Launch, Shipped
from kernels.product import launch_product, launches, product_trial, shipped_product
from nf4 import QuantizedTensor

# Tokens. Beyond, W is decoded once for a dense product: on an H200, 128 tokens in two tiles took 26 to 28 us for
# 4096 x 4096 and 60 to 72 us for 4096 x 11008 and 11008 x 4096; decoding and the dense product take 27 and 57.
FEWEST, LIMIT = 33, 64

LAUNCH = Launch({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=4, num_stages=3)


def accepts(x: Float[Tensor, "M K"], q: QuantizedTensor) -> bool:
    """Whether this form computes x W^T."""
    return x.dtype in (torch.bfloat16, torch.float16) and FEWEST <= x.shape[0] <= LIMIT and decodable(q)


def matmul(
    x: Float[Tensor, "M K"],
    q: QuantizedTensor,
    bias: Float[Tensor, " N"] | None = None,
    xa: Float[Tensor, "M R"] | None = None,
    lora_b: Float[Tensor, "N R"] | None = None,
    scaling: float = 1.0,
) -> Float[Tensor, "M N"]:
    """(M, K) -> (M, N): y = x W^T + bias + scaling xa B^T, where W = dequantize(q) is (N, K)."""
    return launch_product(mid_kernel, LAUNCH, True, x, q, bias, xa, lora_b, scaling)


@triton.jit(do_not_specialize=["M", "R", "parts", "rounds"])
def mid_kernel(
    x_ptr,  # (M, K)
    words_ptr,  # (N, K / 8)
    scales_ptr,  # (N K / block_size,), as are map, nested and offset what `decode.stored` gives
    map_ptr,
    nested_ptr,
    offset_ptr,
    levels_ptr,
    bias_ptr,  # (N,)
    xa_ptr,  # (M, R)
    lora_b_ptr,  # (N, R)
    scaling,
    y_ptr,  # (M, N)
    partial_ptr,  # (tiles, parts, BLOCK_M, BLOCK_N)
    arrived_ptr,  # (tiles,)
    M,
    N,
    K,
    R,
    parts,
    rounds,
    ASM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    NESTED: tl.constexpr,
    INTERPRET: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    W: tl.constexpr = GROUP // 8
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)  # beyond the edge the last row again: its product is not stored, and nothing is masked
    words = words_ptr + row.to(tl.int64) * (K // 8)
    word = tl.arange(0, W)[None, :]
    xs = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :] * K + places(W)[:, None]
    group = row * (K // GROUP)
    offset = 0.0
    if NESTED != 0:
        offset = tl.load(offset_ptr)

    first = tl.program_id(2) * rounds
    last = tl.minimum(first + rounds, K // GROUP)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for g in range(first, last):
        scale = block_scale((group + g) // GROUPS, scales_ptr, map_ptr, nested_ptr, offset, NESTED)
        v0, v1, v2, v3 = decoded_scaled(
            tl.load(words[:, None] + g * W + word), scale[:, None], levels_ptr, x_ptr.dtype.element_ty, ASM, INTERPRET
        )
        w = tile(v0, v1, v2, v3).to(x_ptr.dtype.element_ty, bitcast=True)  # (BLOCK_N, GROUP)
        acc = tl.dot(w, tl.load(xs + g * GROUP), acc, input_precision="ieee")

    complete(
        acc,
        m,
        n,
        bias_ptr,
        xa_ptr,
        lora_b_ptr,
        scaling,
        y_ptr,
        partial_ptr,
        arrived_ptr,
        M,
        N,
        R,
        parts,
        BIAS,
        BLOCK_R,
        SPLIT,
    )


def shipped() -> list[Shipped]:
    """What this file may launch."""
    return shipped_product("matmul_mid", mid_kernel, LAUNCH, True, {80: 10.5, 90: 6.8})


def candidates() -> dict[str, list[Launch]]:
    """Launches worth timing."""
    return {"64 tokens": launches((32, 64), (64, 128, 256))}


def trial(row: str, launch: Launch) -> Callable[[], Tensor]:
    """A call that multiplies as many tokens so."""
    return product_trial(mid_kernel, launch, True, int(row.split()[0]))
