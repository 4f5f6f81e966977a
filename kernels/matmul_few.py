"""x W^T for up to 32 tokens, as in generation: W is read once, in 4 bits, and never stored anywhere else.

At so few tokens the time is that of reading W, if decoding keeps up: at 3 TB/s one instruction a weight is a fifth of
what a large GPU can issue. So the product is taken transposed, y^T = W x^T. W is then the first operand of the matrix
instruction, which may stay in the registers where it was decoded, and only x goes through shared memory. Its features
are read in the order in which the codes come apart (see `decode`), so bytes are used as they are stored. A step is
one group of 64 weights a row with one scale, and the scale multiplies the sums, 16 or 32 a row, not the 64 weights;
decoding the scale itself is nearly free for the same reason, and the level is all that is rounded. M tokens, N
outputs, K inputs, R rank.

Instructions per weight in the main loop, for sm_90 (bfloat16, nf4, double quantization, tokens x outputs, 4 warps):
5.3 for 16x128 and 5.6 for 32x128, as shipped; 7.0 for 16x64, where a thread decodes the scales of as many rows for
half as many weights. About one of them moves a constant of the tables into a register. Tables that are loaded before
the loop cost 6.3, as W then goes through shared memory; hiding from the compiler that they are constants, so that it
keeps them in registers, gave 5.3 to 6.1. On sm_80 5.5 and 6.2.

Measured on an H200 and given up: multiplying one to four tokens without matrix instructions, W along the lanes (4096 x
11008: 29, 39 and 70 us for 1, 2 and 4 tokens, where this takes 23 to 25 for up to 16); and prefetching all lines of a
program's part to L2 before its loop, 8 % slower in the median of launches and never in the fastest.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.decode import block_scale, decodable, decoded, places, tile
from kernels.epilogue import complete
from kernels.launch import Launch, Shipped
from kernels.product import launch_product, launches, product_trial, shipped_product
from nf4 import QuantizedTensor

LIMIT = 32  # tokens

# By the tokens of a tile. 128 outputs give a thread two rows of scales for 64 weights; four warps, so that several
# programs share a processor and one decodes while another waits. Of ten that were timed on an H200 these were the
# fastest over the three shapes of a 7B model (4096 x 4096 in 8 parts): at most 10 % behind the best for a shape.
LAUNCHES = {
    16: Launch({"BLOCK_M": 16, "BLOCK_N": 128}, num_warps=4, num_stages=3, resident=4),
    32: Launch({"BLOCK_M": 32, "BLOCK_N": 128}, num_warps=4, num_stages=3),
}


def accepts(x: Float[Tensor, "M K"], q: QuantizedTensor) -> bool:
    """Whether this form computes x W^T."""
    return x.dtype in (torch.bfloat16, torch.float16) and x.shape[0] <= LIMIT and decodable(q)


def matmul(
    x: Float[Tensor, "M K"],
    q: QuantizedTensor,
    bias: Float[Tensor, " N"] | None = None,
    xa: Float[Tensor, "M R"] | None = None,
    lora_b: Float[Tensor, "N R"] | None = None,
    scaling: float = 1.0,
) -> Float[Tensor, "M N"]:
    """(M, K) -> (M, N): y = x W^T + bias + scaling xa B^T, where W = dequantize(q) is (N, K)."""
    launch = LAUNCHES[16 if x.shape[0] <= 16 else 32]
    return launch_product(few_kernel, launch, False, x, q, bias, xa, lora_b, scaling)


@triton.jit(do_not_specialize=["M", "R", "parts", "rounds"])
def few_kernel(
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
        v0, v1, v2, v3 = decoded(tl.load(words[:, None] + g * W + word), levels_ptr, ASM, INTERPRET)
        w = tile(v0, v1, v2, v3).to(x_ptr.dtype.element_ty, bitcast=True)  # (BLOCK_N, GROUP)
        acc += tl.dot(w, tl.load(xs + g * GROUP), input_precision="ieee") * scale[:, None]

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
    return [
        one
        for tokens, launch in LAUNCHES.items()
        for one in shipped_product("matmul_few", few_kernel, launch, False, INSTRUCTIONS[tokens])
    ]


INSTRUCTIONS = {16: {80: 5.6, 90: 5.5}, 32: {80: 6.3, 90: 5.7}}


def candidates() -> dict[str, list[Launch]]:
    """Launches worth timing for each row of the table."""
    return {f"{tokens} tokens": launches((tokens,), (64, 128, 256)) for tokens in LAUNCHES}


def trial(row: str, launch: Launch) -> Callable[[], Tensor]:
    """A call that multiplies as many tokens so."""
    return product_trial(few_kernel, launch, False, int(row.split()[0]))
