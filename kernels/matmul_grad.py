"""dy W, the gradient of x through a stored weight, with the LoRA branch's part: W is decoded again and not kept.

The sum now runs over the rows of W, each with a scale of its own, so levels are multiplied by scales before the
product (see `matmul_mid` for what that rounds). A program takes one group of 64 columns for all its rows, 128 a
step. The order in which codes come apart falls on the columns of the result, so it is x's gradient that is stored in
that order, and dy is read as it lies. Of the branch only its own product is thinned by the dropout of forward: the
mask is drawn again from the seed, eight entries a draw, and the halves of its four words stand in a tile exactly
where the eight codes of a word stand. M tokens, N outputs, K inputs, R rank.

Instructions per weight in the main loop, for sm_90 (bfloat16, nf4, double quantization, tokens x rows x columns, 4
warps): 6.5 for 64x128x64, as shipped (sm_80: 8.7), which decodes to shared memory, 53 KB, so that three programs share
a processor and one decodes while another multiplies; 7.4 for 16x128x64 (sm_80: 7.0). The transposed product, with W
in registers, needs W turned on the way and takes 7.8 (7.6 with 32 tokens); 64x64x64 takes 7.9, 64x128x128 6.9 with
one program a processor.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels import reference
from kernels.decode import STORED, block_scale, constants, decodable, decoded_scaled, places, stored, tile
from kernels.epilogue import arrivals, arrive_last, split, sum_of_parts
from kernels.launch import Launch, Shipped
from kernels.product import TYPES, launches, operands, rank_block
from nf4 import QuantConfig, QuantizedTensor

# Tokens. Beyond, W is decoded once for a dense product: on an H200, 128 tokens in two tiles took 27 us for
# 4096 x 4096 and 64 to 75 us for 4096 x 11008 and 11008 x 4096; decoding and the dense product take 27 and 57.
LIMIT = 64

# By the tokens of a tile: of ten on an H200 the fastest, 2 % behind the best on average over three shapes of a 7B model
LAUNCHES = {
    16: Launch({"BLOCK_M": 16, "BLOCK_N": 128}, num_warps=4, num_stages=3, resident=4),
    64: Launch({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=4, num_stages=2, resident=3),
}


def accepts(dy: Float[Tensor, "M N"], q: QuantizedTensor) -> bool:
    """Whether this form computes dy W."""
    M, N = dy.shape  # rows of dy that do not start on 32 bytes could not be read in wide loads
    return dy.dtype in (torch.bfloat16, torch.float16) and M <= LIMIT and N % 16 == 0 and decodable(q)


def matmul_grad(
    dy: Float[Tensor, "M N"],
    q: QuantizedTensor,
    dxa: Float[Tensor, "M R"] | None = None,
    lora_a: Float[Tensor, "R K"] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Float[Tensor, "M K"]:
    """(M, N) -> (M, K): dx = dy W + drop(dxa A), with the mask that forward put on x."""
    return grad_by(LAUNCHES[16 if dy.shape[0] <= 16 else 64], dy, q, dxa, lora_a, dropout, seed)


def grad_by(
    launch: Launch,
    dy: Float[Tensor, "M N"],
    q: QuantizedTensor,
    dxa: Float[Tensor, "M R"] | None,
    lora_a: Float[Tensor, "R K"] | None,
    dropout: float,
    seed: int | None,
) -> Float[Tensor, "M K"]:
    """The same as `launch` says."""
    (M, N), K = dy.shape, q.shape[1]
    dx = torch.empty(M, K, dtype=dy.dtype, device=dy.device)
    if not M:
        return dx
    dy = dy.contiguous()
    fixed = constants(q.config, dy.dtype, scaled=True)
    group, block_m, block_n = fixed["GROUP"], launch.constants["BLOCK_M"], launch.constants["BLOCK_N"]
    across, down = -(-M // block_m), K // group
    parts, rounds = split(across * down, -(-N // block_n), dy.device, launch.resident)
    partial, arrived = dx, dx  # not used in a single part
    if parts > 1:
        partial = torch.empty(across * down * parts * block_m * group, dtype=torch.float32, device=dy.device)
        arrived = arrivals(across * down, dy.device)
    R = 0 if dxa is None else dxa.shape[1]
    kernel: Any = grad_kernel
    kernel[across, down, parts](
        dy,
        *stored(q, dy.dtype),
        dy if dxa is None else dxa.contiguous(),
        dy if lora_a is None else lora_a.contiguous(),
        seed or 0,
        reference.threshold(dropout),
        1 / (1 - dropout),
        dx,
        partial,
        arrived,
        M,
        N,
        K,
        R,
        parts,
        rounds,
        **launch.options(
            EVEN=N % block_n == 0,
            DROPOUT=R > 0 and dropout > 0,
            BLOCK_R=rank_block(R),
            SPLIT=parts > 1,
            **fixed,
        ),
    )
    return dx


@triton.jit(do_not_specialize=["seed", "threshold", "M", "R", "parts", "rounds"])
def grad_kernel(
    dy_ptr,  # (M, N)
    words_ptr,  # (N, K / 8)
    scales_ptr,  # (N K / block_size,), as are map, nested and offset what `decode.stored` gives
    map_ptr,
    nested_ptr,
    offset_ptr,
    levels_ptr,
    dxa_ptr,  # (M, R)
    lora_a_ptr,  # (R, K)
    seed,
    threshold,  # of 2^16: what dropout sets to zero
    grown,  # 1 / (1 - dropout)
    dx_ptr,  # (M, K)
    partial_ptr,  # (tiles, parts, BLOCK_M, GROUP)
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
    EVEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    W: tl.constexpr = GROUP // 8
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1)  # of groups
    n = tl.arange(0, BLOCK_N)
    word = column * W + tl.arange(0, W)
    offset = 0.0
    if NESTED != 0:
        offset = tl.load(offset_ptr)

    first = tl.program_id(2) * rounds
    words = words_ptr + (first * BLOCK_N + n).to(tl.int64)[:, None] * (K // 8) + word[None, :]
    dys = dy_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * N + n[None, :]
    acc = tl.zeros((BLOCK_M, GROUP), tl.float32)
    for i in range(first, tl.minimum(first + rounds, tl.cdiv(N, BLOCK_N))):
        row = i * BLOCK_N + n
        if EVEN:
            dy = tl.load(dys + i * BLOCK_N)
            codes = tl.load(words)
            words += BLOCK_N * (K // 8)
        else:  # beyond the edge the last row again, times zero
            dy = tl.load(dys + i * BLOCK_N, mask=(row < N)[None, :], other=0.0)
            row = tl.minimum(row, N - 1)
            codes = tl.load(words_ptr + row.to(tl.int64)[:, None] * (K // 8) + word[None, :])
        block = (row * (K // GROUP) + column) // GROUPS
        scale = block_scale(block, scales_ptr, map_ptr, nested_ptr, offset, NESTED)
        v0, v1, v2, v3 = decoded_scaled(codes, scale[:, None], levels_ptr, DTYPE, ASM, INTERPRET)
        w = tile(v0, v1, v2, v3).to(DTYPE, bitcast=True)  # (BLOCK_N, GROUP)
        acc = tl.dot(dy, w, acc, input_precision="ieee")

    if SPLIT:
        own = tl.program_id(0) + column * tl.num_programs(0)
        place = tl.arange(0, BLOCK_M)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        used = (m < M)[:, None]
        SIZE: tl.constexpr = BLOCK_M * GROUP
        if arrive_last(acc, place, used, partial_ptr, arrived_ptr, own, tl.program_id(2), parts, SIZE):
            acc = sum_of_parts(acc, place, used, partial_ptr, arrived_ptr, own, parts, SIZE)
            finish_grad(
                acc, m, column, dxa_ptr, lora_a_ptr, seed, threshold, grown, dx_ptr, M, K, R, W, DROPOUT, BLOCK_R
            )
    else:
        finish_grad(acc, m, column, dxa_ptr, lora_a_ptr, seed, threshold, grown, dx_ptr, M, K, R, W, DROPOUT, BLOCK_R)


@triton.jit
def finish_grad(
    acc,
    m,
    column,
    dxa_ptr,
    lora_a_ptr,
    seed,
    threshold,
    grown,
    dx_ptr,
    M,
    K,
    R,
    W: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add the thinned product of dxa (M, R) and lora_a (R, K), and store a tile of dx (M, K)."""
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    k = column * (8 * W) + places(W)
    m_ok = (m < M)[:, None]
    if BLOCK_R != 0:
        branch = tl.zeros_like(acc)
        r = tl.arange(0, BLOCK_R)
        inner = dxa_ptr + m.to(tl.int64)[:, None] * R + r[None, :]
        outer = lora_a_ptr + r.to(tl.int64)[:, None] * K + k[None, :]
        for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
            dxa = tl.load(inner, mask=m_ok & (r0 + r < R)[None, :], other=0.0).to(DTYPE)
            lora_a = tl.load(outer, mask=(r0 + r < R)[:, None], other=0.0).to(DTYPE)
            branch = tl.dot(dxa, lora_a, branch, input_precision="ieee")
            inner += BLOCK_R
            outer += BLOCK_R * K
        if DROPOUT:
            eighth = m.to(tl.int64)[:, None] * (K // 8) + (column * W + tl.arange(0, W))[None, :]
            d0, d1, d2, d3 = tl.randint4x(seed, eighth)
            drawn = tile(
                d0.to(tl.int32, bitcast=True),
                d1.to(tl.int32, bitcast=True),
                d2.to(tl.int32, bitcast=True),
                d3.to(tl.int32, bitcast=True),
            )
            branch = tl.where(drawn.to(tl.int32) >= threshold, branch * grown, 0.0)
        acc += branch
    tl.store(dx_ptr + m.to(tl.int64)[:, None] * K + k[None, :], acc.to(DTYPE), mask=m_ok)


def shipped() -> list[Shipped]:
    """What this file may launch."""
    plain, small = QuantConfig("fp4", double_quant=False), QuantConfig("int4", block_size=32)
    return [
        one
        for tokens, launch in LAUNCHES.items()
        for one in (
            variant(launch, torch.bfloat16, QuantConfig(), full=True, instructions=INSTRUCTIONS[tokens]),
            variant(launch, torch.float16, plain, full=False, instructions={}),
            variant(launch, torch.bfloat16, small, full=True, instructions={}),
        )
    ]


INSTRUCTIONS = {16: {80: 7.2, 90: 7.5}, 64: {80: 8.9, 90: 6.7}}


def variant(
    launch: Launch, dtype: torch.dtype, config: QuantConfig, full: bool, instructions: dict[int, float]
) -> Shipped:
    """One configuration; `full` has a split sum and a LoRA branch with dropout, and not `full` has a ragged N."""
    type_, fixed = TYPES[dtype], constants(config, dtype, scaled=True)
    block_m, block_n = launch.constants["BLOCK_M"], launch.constants["BLOCK_N"]
    signature = {
        "dy_ptr": f"*{type_}",
        **STORED,
        "scales_ptr": "*u8" if config.double_quant else "*fp32",
        "dxa_ptr": f"*{type_}",
        "lora_a_ptr": "*fp32" if full else f"*{type_}",
        "seed": "i64",
        "threshold": "i32",
        "grown": "fp32",
        "dx_ptr": f"*{type_}",
        "partial_ptr": "*fp32" if full else f"*{type_}",
        "arrived_ptr": "*i32" if full else f"*{type_}",
        **dict.fromkeys(("M", "N", "K", "R", "parts", "rounds"), "i32"),
    }
    flags = {"EVEN": full, "DROPOUT": full, "BLOCK_R": 16 if full else 0, "SPLIT": full}
    tail = " full" if full else ""
    return Shipped(
        name=f"matmul_grad {block_m}x{block_n} {type_} {config.codebook} block {config.block_size}{tail}",
        kernel=grad_kernel,
        signature=signature,
        launch=Launch({**fixed, **flags, **launch.constants}, launch.num_warps, launch.num_stages),
        aligned=tuple(name for name in signature if name.endswith("_ptr") or name in ("N", "K")),
        weights_per_thread=block_n * fixed["GROUP"] / (32 * launch.num_warps) if instructions else None,
        instructions=instructions,
    )


def candidates() -> dict[str, list[Launch]]:
    """Launches worth timing for each row of the table."""
    return {"16 tokens": launches((16, 32), (64, 128)), "64 tokens": launches((16, 32, 64), (64, 128))}


def trial(row: str, launch: Launch) -> Callable[[], Tensor]:
    """A call that makes the gradient of as many tokens so."""
    dy, q = operands(int(row.split()[0]))
    return lambda: grad_by(launch, dy, q, None, None, 0.0, None)
