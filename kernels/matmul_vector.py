"""x W^T for one to four tokens, as in generation: a row of W against each token, without the matrix instruction.

With so few tokens 15 of 16 columns of a matrix instruction would be padding, and to keep all processors busy the sums
would have to be split and put together again. Instead a program takes a few whole rows: its threads stand side by side
along a row, so that each asks for 16 bytes at once and all that a program will ever read is on its way from the start.
Levels come apart as elsewhere (see `decode`); products and sums are float32, and a scale multiplies the sum of eight.
M tokens, N outputs, K inputs, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.decode import (
    DECODE_BY_TABLES,
    STORED,
    block_scale,
    constants,
    decodable,
    decoded_by_tables,
    high_half,
    low_half,
    stored,
    tables_on,
)
from kernels.launch import Launch, Shipped, ceil_div
from kernels.product import TYPES, operands
from nf4 import QuantConfig, QuantizedTensor

LIMIT = 4  # tokens

# By the number of tokens: x is kept in registers, which more threads share if there is more of it.
LAUNCHES = {
    1: Launch({"BLOCK_N": 4, "BLOCK_G": 64}, num_warps=4, num_stages=1),
    2: Launch({"BLOCK_N": 4, "BLOCK_G": 32}, num_warps=4, num_stages=1),
    3: Launch({"BLOCK_N": 4, "BLOCK_G": 32}, num_warps=4, num_stages=1),
    4: Launch({"BLOCK_N": 4, "BLOCK_G": 32}, num_warps=4, num_stages=1),
}


def accepts(x: Float[Tensor, "M K"], q: QuantizedTensor) -> bool:
    """Whether this form computes x W^T; rows of x are read in pairs of features."""
    return x.dtype in (torch.bfloat16, torch.float16) and 1 <= x.shape[0] <= LIMIT and decodable(q)


def matmul(
    x: Float[Tensor, "M K"],
    q: QuantizedTensor,
    bias: Float[Tensor, " N"] | None = None,
    xa: Float[Tensor, "M R"] | None = None,
    lora_b: Float[Tensor, "N R"] | None = None,
    scaling: float = 1.0,
) -> Float[Tensor, "M N"]:
    """(M, K) -> (M, N): y = x W^T + bias + scaling xa B^T, where W = dequantize(q) is (N, K)."""
    return matmul_by(LAUNCHES[x.shape[0]], x, q, bias, xa, lora_b, scaling)


def matmul_by(
    launch: Launch,
    x: Float[Tensor, "M K"],
    q: QuantizedTensor,
    bias: Float[Tensor, " N"] | None,
    xa: Float[Tensor, "M R"] | None,
    lora_b: Float[Tensor, "N R"] | None,
    scaling: float,
) -> Float[Tensor, "M N"]:
    """The same as `launch` says."""
    (M, K), N = x.shape, q.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    x = x.contiguous()
    if x.data_ptr() % 4:  # a slice of a buffer may begin between two pairs
        x = x.clone()
    R = 0 if xa is None else xa.shape[1]
    kernel: Any = vector_kernel
    kernel[ceil_div(N, launch.constants["BLOCK_N"]),](
        x.view(torch.int32),
        *stored(q, x.dtype),
        tables_on(q.config.codebook, x.dtype, x.device),
        x if bias is None else bias.contiguous(),
        x if xa is None else xa.contiguous(),
        x if lora_b is None else lora_b.contiguous(),
        float(scaling),
        y,
        N,
        K,
        R,
        **launch.options(M=M, BIAS=bias is not None, BRANCH=xa is not None, **fixed(q.config, x.dtype)),
    )
    return y


def fixed(config: QuantConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What of a weight's config the kernel is compiled for; tables of levels come in registers."""
    return {**constants(config, dtype, False), "ASM": DECODE_BY_TABLES}


@triton.jit(do_not_specialize=["R"])
def vector_kernel(
    x_ptr,  # (M, K / 2) pairs of features
    words_ptr,  # (N, K / 8)
    scales_ptr,  # (N K / block_size,), as are map, nested and offset what `decode.stored` gives
    map_ptr,
    nested_ptr,
    offset_ptr,
    levels_ptr,
    tables_ptr,  # (8,)
    bias_ptr,  # (N,)
    xa_ptr,  # (M, R)
    lora_b_ptr,  # (N, R)
    scaling,
    y_ptr,  # (M, N)
    N,
    K,
    R,
    M: tl.constexpr,
    ASM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    NESTED: tl.constexpr,
    INTERPRET: tl.constexpr,
    BIAS: tl.constexpr,
    BRANCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """(M, BLOCK_N) of y."""
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    W: tl.constexpr = GROUP // 8
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)  # beyond the edge the last row again: its product is not stored
    group = tl.arange(0, BLOCK_G)
    word = group[:, None] * W + tl.arange(0, W)[None, :]  # (BLOCK_G, W)
    offset = 0.0
    if NESTED != 0:
        offset = tl.load(offset_ptr)

    acc0 = tl.zeros((BLOCK_N, BLOCK_G, W), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for first in range(0, K // GROUP, BLOCK_G):
        inside = first + group < K // GROUP
        at = words_ptr + row.to(tl.int64)[:, None, None] * (K // 8) + (first * W + word)[None, :, :]
        words = tl.load(at, mask=inside[None, :, None], other=0)
        block = (row[:, None] * (K // GROUP) + tl.minimum(first + group, K // GROUP - 1)[None, :]) // GROUPS
        scale = block_scale(block, scales_ptr, map_ptr, nested_ptr, offset, NESTED)[:, :, None]
        v0, v1, v2, v3 = decoded_by_tables(words, tables_ptr, levels_ptr, ASM, INTERPRET)
        pairs = x_ptr + (first * W + word) * 4
        here = inside[:, None]
        acc0 += scale * eight(v0, v1, v2, v3, pairs, here, DTYPE)
        if M > 1:
            acc1 += scale * eight(v0, v1, v2, v3, pairs + K // 2, here, DTYPE)
        if M > 2:
            acc2 += scale * eight(v0, v1, v2, v3, pairs + K, here, DTYPE)
        if M > 3:
            acc3 += scale * eight(v0, v1, v2, v3, pairs + K // 2 * 3, here, DTYPE)

    arguments = (n, bias_ptr, xa_ptr, lora_b_ptr, scaling, y_ptr, N, R)
    finish_row(acc0, 0, arguments, BIAS, BRANCH)
    if M > 1:
        finish_row(acc1, 1, arguments, BIAS, BRANCH)
    if M > 2:
        finish_row(acc2, 2, arguments, BIAS, BRANCH)
    if M > 3:
        finish_row(acc3, 3, arguments, BIAS, BRANCH)


@triton.jit
def eight(v0, v1, v2, v3, pairs, inside, DTYPE: tl.constexpr):
    """(BLOCK_N, BLOCK_G, W): eight levels a word times the eight features (BLOCK_G, W) that `pairs` begins with."""
    j = tl.arange(0, 4)[None, None, :]
    x = tl.load(pairs[:, :, None] + j, mask=inside[:, :, None], other=0)  # (BLOCK_G, W, 4)
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    total = low_value(v0, DTYPE) * low_value(x0, DTYPE)[None, :, :]
    total += high_value(v0, DTYPE) * high_value(x0, DTYPE)[None, :, :]
    total += low_value(v1, DTYPE) * low_value(x1, DTYPE)[None, :, :]
    total += high_value(v1, DTYPE) * high_value(x1, DTYPE)[None, :, :]
    total += low_value(v2, DTYPE) * low_value(x2, DTYPE)[None, :, :]
    total += high_value(v2, DTYPE) * high_value(x2, DTYPE)[None, :, :]
    total += low_value(v3, DTYPE) * low_value(x3, DTYPE)[None, :, :]
    return total + high_value(v3, DTYPE) * high_value(x3, DTYPE)[None, :, :]


@triton.jit
def low_value(pair, DTYPE: tl.constexpr):
    """The first of two numbers in 16 bits, in float32, of which bfloat16 is the upper half."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        value = (pair << 16).to(tl.float32, bitcast=True)
    else:
        value = low_half(pair).to(DTYPE, bitcast=True).to(tl.float32)
    return value


@triton.jit
def high_value(pair, DTYPE: tl.constexpr):
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        value = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        value = high_half(pair).to(DTYPE, bitcast=True).to(tl.float32)
    return value


@triton.jit
def finish_row(acc, m: tl.constexpr, arguments, BIAS: tl.constexpr, BRANCH: tl.constexpr):
    """Sum up one token's outputs (BLOCK_N, BLOCK_G, W), add bias and branch, and store them."""
    n, bias_ptr, xa_ptr, lora_b_ptr, scaling, y_ptr, N, R = arguments
    y = tl.sum(tl.sum(acc, axis=2), axis=1)  # (BLOCK_N,)
    if BRANCH:
        branch = tl.zeros_like(y)
        for start in range(0, R, 16):
            r = start + tl.arange(0, 16)
            xa = tl.load(xa_ptr + m * R + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
            at = lora_b_ptr + n.to(tl.int64)[:, None] * R + r[None, :]
            lora_b = tl.load(at, mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)
            branch += tl.sum(lora_b.to(y_ptr.dtype.element_ty).to(tl.float32) * xa, axis=1)
        y += scaling * branch
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + m * N.to(tl.int64) + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def shipped() -> list[Shipped]:
    """Every number of tokens in its usual form, whose instructions are counted, and the first in other forms."""
    plain, small = QuantConfig("fp4", double_quant=False), QuantConfig("int4", block_size=32)
    usual = [variant(M, torch.bfloat16, QuantConfig(), True, INSTRUCTIONS[M]) for M in LAUNCHES]
    return [*usual, variant(1, torch.float16, plain, False, {}), variant(1, torch.bfloat16, small, True, {})]


# Per weight: 5.1 is what an H100 has time for as it reads NF4 at full speed.
INSTRUCTIONS = {1: {80: 7.5, 90: 7.5}, 2: {80: 10.5, 90: 10.5}, 3: {80: 12.0, 90: 12.0}, 4: {80: 15.0, 90: 15.5}}


def variant(M: int, dtype: torch.dtype, config: QuantConfig, full: bool, instructions: dict[int, float]) -> Shipped:
    """One configuration; `full` has a bias and a LoRA branch."""
    type_, launch = TYPES[dtype], LAUNCHES[M]
    adapter = "*fp32" if full else f"*{type_}"
    signature = {
        "x_ptr": "*i32",
        **STORED,
        "tables_ptr": "*i32",
        "scales_ptr": "*u8" if config.double_quant else "*fp32",
        "bias_ptr": f"*{type_}",
        "xa_ptr": f"*{type_}",
        "lora_b_ptr": adapter,
        "scaling": "fp32",
        "y_ptr": f"*{type_}",
        **dict.fromkeys(("N", "K", "R"), "i32"),
    }
    compiled_for = {**fixed(config, dtype), "M": M, "BIAS": full, "BRANCH": full}
    tile = launch.constants["BLOCK_N"] * launch.constants["BLOCK_G"] * compiled_for["GROUP"]
    return Shipped(
        name=f"matmul_vector {M} {type_} {config.codebook} block {config.block_size}{' full' * full}",
        kernel=vector_kernel,
        signature=signature,
        launch=Launch({**compiled_for, **launch.constants}, launch.num_warps, launch.num_stages),
        aligned=tuple(name for name in signature if name.endswith("_ptr") or name in ("N", "K")),
        weights_per_thread=tile / (32 * launch.num_warps) if instructions else None,
        instructions=instructions,
    )


def candidates() -> dict[str, list[Launch]]:
    """Launches worth timing for each row of the table."""
    tiles = [{"BLOCK_N": n, "BLOCK_G": g} for n in (2, 4, 8, 16) for g in (32, 64, 128)]
    launches = [Launch(tile, warps, 1) for tile in tiles for warps in (2, 4, 8)]
    return {f"{tokens} tokens": launches for tokens in LAUNCHES}


def trial(row: str, launch: Launch) -> Callable[[], Tensor]:
    """A call that multiplies as many tokens so."""
    x, q = operands(int(row.split()[0]))
    return lambda: matmul_by(launch, x, q, None, None, None, 1.0)
