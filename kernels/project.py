"""The narrow products of a LoRA branch: xa = drop(x) A^T, and the gradient of A, dxa^T drop(x).

R is small, so what takes time is reading x once; and K or M alone would give too few programs to read it fast. So
the inner axis is cut into parts, each summed by a program of its own in float32, and the parts' sums are added in
order afterwards: the same bits every time, which atomic additions would not give. Dropout falls on the tile of x as
it passes, by numbers made on the spot; its factor waits for the sum.
M tokens, K inputs, R rank.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.dropout import DTYPES, kept, threshold
from kernels.launch import Launch, Shipped, ceil_div

PROGRAMS = 264  # two for each multiprocessor of an H100

LAUNCHES = {
    "few": Launch({"BM": 16, "BK": 64}, num_warps=4, num_stages=3),  # up to 16 tokens without dropout: generation
    "many": Launch({"BM": 64, "BK": 64}, num_warps=4, num_stages=3),
    "grad": Launch({"BM": 64, "BK": 64}, num_warps=4, num_stages=3),
}
RANKS = (16, 32, 64)  # widths of the rank's tile; a higher rank takes several

# Instructions per entry of x, by rank: reading x at full speed leaves time for 19 on an H100. With few tokens most
# of them handle A, and with dropout eleven an entry make the mask.
INSTRUCTIONS = {
    "project, few tokens": {16: {80: 9.0, 90: 9.0}, 32: {80: 10.5, 90: 10.0}, 64: {80: 14.5, 90: 14.0}},
    "project": {16: {80: 3.5, 90: 3.5}, 32: {80: 4.0, 90: 4.0}, 64: {80: 5.5, 90: 5.0}},
    "project, dropout": {16: {80: 16.0, 90: 15.0}, 32: {80: 17.0, 90: 15.5}, 64: {80: 18.5, 90: 16.5}},
    "project_grad": {16: {80: 4.5, 90: 4.5}, 32: {80: 5.5, 90: 5.5}, 64: {80: 7.5, 90: 5.5}},
    "project_grad, dropout": {16: {80: 17.5, 90: 18.0}, 32: {80: 20.0, 90: 20.0}, 64: {80: 24.5, 90: 17.5}},
}


def accepts(x: Float[Tensor, "M K"], *_: object) -> bool:
    """Whether these forms multiply x: of any type a model computes in."""
    return x.dtype in DTYPES


def project(
    x: Float[Tensor, "M K"], lora_a: Float[Tensor, "R K"], dropout: float = 0.0, seed: int | None = None
) -> Float[Tensor, "M R"]:
    """(M, K) -> (M, R): xa = drop(x) A^T, multiplied in x's dtype."""
    few = len(x) <= LAUNCHES["few"].constants["BM"] and not dropout
    return project_by(LAUNCHES["few" if few else "many"], x, lora_a, dropout, seed)


def project_by(
    launch: Launch, x: Float[Tensor, "M K"], lora_a: Float[Tensor, "R K"], dropout: float, seed: int | None
) -> Float[Tensor, "M R"]:
    """`project`, as `launch` says."""
    (M, K), R = x.shape, lora_a.shape[0]
    BM, BK, BR = launch.constants["BM"], launch.constants["BK"], rank_tile(R)
    tiles = ceil_div(M, BM) * ceil_div(R, BR)
    steps = split(ceil_div(K, BK), tiles)
    out = sums(ceil_div(K, steps * BK), M, R, x)
    if out.numel():
        x, lora_a = x.contiguous(), lora_a.contiguous()
        grid = (ceil_div(M, BM), ceil_div(R, BR), len(out))
        project_kernel[grid](
            x, lora_a, out, M, K, R, steps, *dropping(dropout, seed), **launch.options(EIGHTS=K % 8 == 0, BR=BR)
        )
    return total(out, x.dtype)


def project_grad(
    dxa: Float[Tensor, "M R"], x: Float[Tensor, "M K"], dropout: float = 0.0, seed: int | None = None
) -> Float[Tensor, "R K"]:
    """(M, R), (M, K) -> (R, K): dA = dxa^T drop(x)."""
    return project_grad_by(LAUNCHES["grad"], dxa, x, dropout, seed)


def project_grad_by(
    launch: Launch, dxa: Float[Tensor, "M R"], x: Float[Tensor, "M K"], dropout: float, seed: int | None
) -> Float[Tensor, "R K"]:
    """`project_grad`, as `launch` says."""
    (M, K), R = x.shape, dxa.shape[1]
    BM, BK, BR = launch.constants["BM"], launch.constants["BK"], rank_tile(R)
    tiles = ceil_div(K, BK) * ceil_div(R, BR)
    steps = split(ceil_div(M, BM), tiles)
    out = sums(ceil_div(M, steps * BM), R, K, x)
    if out.numel():
        dxa, x = dxa.contiguous(), x.contiguous()
        grid = (ceil_div(K, BK), ceil_div(R, BR), len(out))
        project_grad_kernel[grid](
            dxa, x, out, M, K, R, steps, *dropping(dropout, seed), **launch.options(EIGHTS=K % 8 == 0, BR=BR)
        )
    return total(out, x.dtype)


@triton.jit(do_not_specialize=["seed", "threshold", "steps"])
def project_kernel(
    x_ptr,  # (M, K)
    a_ptr,  # (R, K)
    out_ptr,  # (parts, M, R)
    M,
    K,
    R,
    steps,  # tiles of K in one part
    seed,
    threshold,
    factor,
    DROP: tl.constexpr,
    EIGHTS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """(BM, BR) of one part's sums."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    part = tl.program_id(2)
    row = m.to(tl.int64)[:, None] * K
    acc = tl.zeros((BM, BR), tl.float32)
    for step in range(steps):
        first = (part * steps + step) * BK
        k = (first + tl.arange(0, BK))[None, :]
        x = tl.load(x_ptr + row + k, mask=(m[:, None] < M) & (k < K), other=0.0)
        a = tl.load(a_ptr + r.to(tl.int64)[:, None] * K + k, mask=(r[:, None] < R) & (k < K), other=0.0)
        if DROP:
            x = tl.where(kept(seed, threshold, m, first, K, BK, EIGHTS), x, tl.zeros_like(x))
        acc = tl.dot(x, tl.trans(a.to(x.dtype)), acc, input_precision="ieee")
    at = (part.to(tl.int64) * M + m.to(tl.int64))[:, None] * R + r[None, :]
    tl.store(out_ptr + at, (acc * factor).to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (r[None, :] < R))


@triton.jit(do_not_specialize=["seed", "threshold", "steps"])
def project_grad_kernel(
    dxa_ptr,  # (M, R)
    x_ptr,  # (M, K)
    out_ptr,  # (parts, R, K)
    M,
    K,
    R,
    steps,  # tiles of M in one part
    seed,
    threshold,
    factor,
    DROP: tl.constexpr,
    EIGHTS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """(BR, BK) of one part's sums."""
    first = tl.program_id(0) * BK
    k = (first + tl.arange(0, BK))[None, :]
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    part = tl.program_id(2)
    acc = tl.zeros((BR, BK), tl.float32)
    for step in range(steps):
        m = (part * steps + step) * BM + tl.arange(0, BM)
        row = m.to(tl.int64)[:, None]
        dxa = tl.load(dxa_ptr + row * R + r[None, :], mask=(m[:, None] < M) & (r[None, :] < R), other=0.0)
        x = tl.load(x_ptr + row * K + k, mask=(m[:, None] < M) & (k < K), other=0.0)
        if DROP:
            x = tl.where(kept(seed, threshold, m, first, K, BK, EIGHTS), x, tl.zeros_like(x))
        acc = tl.dot(tl.trans(dxa.to(x.dtype)), x, acc, input_precision="ieee")
    at = (part.to(tl.int64) * R + r.to(tl.int64))[:, None] * K + k
    tl.store(out_ptr + at, (acc * factor).to(out_ptr.dtype.element_ty), mask=(r[:, None] < R) & (k < K))


def rank_tile(R: int) -> int:
    return next((width for width in RANKS if width >= R), RANKS[-1])


def split(inner: int, tiles: int) -> int:
    """How many tiles of the inner axis a program adds up, so that there are about PROGRAMS of them."""
    parts = max(min(PROGRAMS // max(tiles, 1), inner), 1)
    return max(ceil_div(inner, parts), 1)


def sums(parts: int, rows: int, columns: int, x: Tensor) -> Tensor:
    """Where the parts' sums go: float32, or at once x's dtype if there is but one part."""
    return x.new_empty(parts, rows, columns, dtype=torch.float32 if parts > 1 else x.dtype)


def total(out: Float[Tensor, "parts rows columns"], dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
    return out[0] if len(out) == 1 else out.sum(0).to(dtype)


def dropping(dropout: float, seed: int | None) -> tuple[Any, ...]:
    """A kernel's seed, threshold and factor, and whether it drops at all."""
    if not dropout or seed is None:
        return 0, 0, 1.0, False
    return seed, threshold(dropout), 1 / (1 - dropout), True


def shipped() -> list[Shipped]:
    """What may be launched on real activations, with an adapter in float32."""
    sizes = {"M": "i32", "K": "i32", "R": "i32", "steps": "i32", "seed": "i64", "threshold": "i32", "factor": "fp32"}
    forward = {"x_ptr": "*bf16", "a_ptr": "*fp32", "out_ptr": "*fp32"}
    backward = {"dxa_ptr": "*bf16", "x_ptr": "*bf16", "out_ptr": "*fp32"}
    forms: list[tuple[str, str, Any, dict[str, str], bool]] = [
        ("project, few tokens", "few", project_kernel, forward, False),
        ("project", "many", project_kernel, forward, False),
        ("project, dropout", "many", project_kernel, forward, True),
        ("project_grad", "grad", project_grad_kernel, backward, False),
        ("project_grad, dropout", "grad", project_grad_kernel, backward, True),
    ]
    return [
        Shipped(
            name=f"{name}, rank {BR}",
            kernel=kernel,
            signature={**pointers, **sizes},
            launch=replace(
                LAUNCHES[row], constants={**LAUNCHES[row].constants, "DROP": drops, "EIGHTS": True, "BR": BR}
            ),
            aligned=(*pointers, "K", "R"),
            weights_per_thread=entries_per_thread(LAUNCHES[row]),
            instructions=INSTRUCTIONS[name][BR],
        )
        for name, row, kernel, pointers, drops in forms
        for BR in RANKS
    ]


def entries_per_thread(launch: Launch) -> float:
    """Entries of x that a thread handles in one round of the loop."""
    return launch.constants["BM"] * launch.constants["BK"] / (32 * launch.num_warps)


def candidates() -> dict[str, list[Launch]]:
    """Launches worth timing for each row of the table."""

    def launches(*tokens: int) -> list[Launch]:
        tiles = [{"BM": BM, "BK": BK} for BM in tokens for BK in (32, 64, 128)]
        return [Launch(tile, warps, stages) for tile in tiles for warps in (4, 8) for stages in (2, 3, 4)]

    return {"few": launches(16), "many": launches(32, 64, 128), "grad": launches(32, 64, 128)}


def trial(row: str, launch: Launch) -> Callable[[], Tensor]:
    """A call that multiplies usual activations so, for `benchmarks/tune.py`."""
    M, K, R, dropout = (16 if row == "few" else 4096), 4096, 64, (0.0 if row == "few" else 0.1)
    x = torch.randn(M, K, dtype=torch.bfloat16, device="cuda")
    if row == "grad":
        dxa = torch.randn(M, R, dtype=torch.bfloat16, device="cuda")
        return lambda: project_grad_by(launch, dxa, x, dropout, 1)
    lora_a = torch.randn(R, K, device="cuda")
    return lambda: project_by(launch, x, lora_a, dropout, 1)
