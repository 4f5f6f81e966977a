"""The narrow products of a LoRA branch: xa = drop(x) A^T, and the gradient of A, dxa^T drop(x).

R is small, so what takes time is reading x once; and K or M alone would give too few programs to read it fast. So
the inner axis is cut into parts, each summed by a program of its own in float32, and the last of a tile's programs
adds up the parts (see `epilogue`): the same bits every time, and one launch. Dropout falls on the tile of x as it
passes, by numbers made on the spot; its factor waits for the sum.
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

from kernels.dropout import DTYPES, dropping, kept
from kernels.epilogue import arrivals, arrive_last, sum_of_parts
from kernels.launch import Launch, Shipped, ceil_div

PROGRAMS = 264  # two for each multiprocessor of an H100
MOST_PARTS = 16  # of one tile; the last of its programs reads them all, and the others are gone by then

LAUNCHES = {
    "few": Launch({"BM": 16, "BK": 64}, num_warps=4, num_stages=3),  # up to 16 tokens without dropout: generation
    "many": Launch({"BM": 64, "BK": 64}, num_warps=4, num_stages=3),
    "grad": Launch({"BM": 64, "BK": 64}, num_warps=4, num_stages=3),
}
RANKS = (16, 32, 64)  # widths of the rank's tile; a higher rank takes several

# Instructions per entry of x, by rank: reading x at full speed leaves time for 19 on an H100. With few tokens most
# of them handle A, and with dropout eleven an entry make the mask.
INSTRUCTIONS = {
    "project, few tokens": {16: {80: 9.0, 90: 10.0}, 32: {80: 10.5, 90: 11.0}, 64: {80: 14.5, 90: 14.5}},
    "project": {16: {80: 3.5, 90: 3.5}, 32: {80: 4.0, 90: 4.0}, 64: {80: 5.5, 90: 5.0}},
    "project, dropout": {16: {80: 16.0, 90: 15.0}, 32: {80: 17.0, 90: 16.0}, 64: {80: 19.0, 90: 17.5}},
    "project_grad": {16: {80: 4.5, 90: 4.5}, 32: {80: 5.5, 90: 5.5}, 64: {80: 7.5, 90: 5.5}},
    "project_grad, dropout": {16: {80: 17.5, 90: 18.0}, 32: {80: 20.5, 90: 20.0}, 64: {80: 24.5, 90: 17.5}},
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
    out = x.new_empty(M, R)
    if out.numel():
        x, lora_a = x.contiguous(), lora_a.contiguous()
        tiles = ceil_div(M, BM), ceil_div(R, BR)
        steps, parts, memory = split(ceil_div(K, BK), tiles, BM * BR, out)
        project_kernel[*tiles, parts](
            x,
            lora_a,
            out,
            *memory,
            M,
            K,
            R,
            steps,
            parts,
            *dropping(dropout, seed),
            **launch.options(EIGHTS=K % 8 == 0, SPLIT=parts > 1, BR=BR),
        )
    return out


def project_grad(
    dxa: Float[Tensor, "M R"],
    x: Float[Tensor, "M K"],
    dropout: float = 0.0,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "R K"]:
    """(M, R), (M, K) -> (R, K): dA = dxa^T drop(x), multiplied in x's dtype and rounded to `dtype` (x's)."""
    return project_grad_by(LAUNCHES["grad"], dxa, x, dropout, seed, dtype)


def project_grad_by(
    launch: Launch,
    dxa: Float[Tensor, "M R"],
    x: Float[Tensor, "M K"],
    dropout: float,
    seed: int | None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "R K"]:
    """`project_grad`, as `launch` says."""
    (M, K), R = x.shape, dxa.shape[1]
    BM, BK, BR = launch.constants["BM"], launch.constants["BK"], rank_tile(R)
    out = x.new_empty(R, K, dtype=dtype or x.dtype)
    if not M:
        return out.zero_()
    if out.numel():
        dxa, x = dxa.contiguous(), x.contiguous()
        tiles = ceil_div(K, BK), ceil_div(R, BR)
        steps, parts, memory = split(ceil_div(M, BM), tiles, BK * BR, out)
        project_grad_kernel[*tiles, parts](
            dxa,
            x,
            out,
            *memory,
            M,
            K,
            R,
            steps,
            parts,
            *dropping(dropout, seed),
            **launch.options(EIGHTS=K % 8 == 0, SPLIT=parts > 1, BR=BR),
        )
    return out


@triton.jit(do_not_specialize=["seed", "threshold", "steps", "parts"])
def project_kernel(
    x_ptr,  # (M, K)
    a_ptr,  # (R, K)
    out_ptr,  # (M, R)
    partial_ptr,  # (tiles, parts, BM, BR)
    arrived_ptr,  # (tiles,)
    M,
    K,
    R,
    steps,  # tiles of K in one part
    parts,
    seed,
    threshold,
    factor,
    DROP: tl.constexpr,
    EIGHTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """(BM, BR) of xa, or one part of their sums."""
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
    at = out_ptr + m.to(tl.int64)[:, None] * R + r[None, :]
    ok = (m[:, None] < M) & (r[None, :] < R)
    if SPLIT:
        own = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
        place = tl.arange(0, BM)[:, None] * BR + tl.arange(0, BR)[None, :]
        if arrive_last(acc, place, ok, partial_ptr, arrived_ptr, own, part, parts, BM * BR):
            acc = sum_of_parts(acc, place, ok, partial_ptr, arrived_ptr, own, parts, BM * BR)
            tl.store(at, (acc * factor).to(out_ptr.dtype.element_ty), mask=ok)
    else:
        tl.store(at, (acc * factor).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["seed", "threshold", "steps", "parts"])
def project_grad_kernel(
    dxa_ptr,  # (M, R)
    x_ptr,  # (M, K)
    out_ptr,  # (R, K)
    partial_ptr,  # (tiles, parts, BR, BK)
    arrived_ptr,  # (tiles,)
    M,
    K,
    R,
    steps,  # tiles of M in one part
    parts,
    seed,
    threshold,
    factor,
    DROP: tl.constexpr,
    EIGHTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """(BR, BK) of dA, or one part of their sums."""
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
    at = out_ptr + r.to(tl.int64)[:, None] * K + k
    ok = (r[:, None] < R) & (k < K)
    if SPLIT:
        own = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
        place = tl.arange(0, BR)[:, None] * BK + tl.arange(0, BK)[None, :]
        if arrive_last(acc, place, ok, partial_ptr, arrived_ptr, own, part, parts, BR * BK):
            acc = sum_of_parts(acc, place, ok, partial_ptr, arrived_ptr, own, parts, BR * BK)
            tl.store(at, (acc * factor).to(out_ptr.dtype.element_ty), mask=ok)
    else:
        tl.store(at, (acc * factor).to(out_ptr.dtype.element_ty), mask=ok)


def rank_tile(R: int) -> int:
    return next((width for width in RANKS if width >= R), RANKS[-1])


def split(inner: int, tiles: tuple[int, int], size: int, out: Tensor) -> tuple[int, int, tuple[Tensor, Tensor]]:
    """How many tiles of the inner axis a program adds up, so that there are about PROGRAMS of them; the parts.

    With them memory for the sums of the parts, `size` numbers each, and a counter for each tile of the result.
    """
    count = tiles[0] * tiles[1]
    steps = ceil_div(inner, max(min(PROGRAMS // count, inner, MOST_PARTS), 1))
    parts = ceil_div(inner, steps)
    if parts == 1:
        return steps, parts, (out, out)
    partial = torch.empty(count * parts * size, dtype=torch.float32, device=out.device)
    return steps, parts, (partial, arrivals(count, out.device))


def shipped() -> list[Shipped]:
    """What may be launched on real activations, with an adapter in float32."""
    sizes = {**dict.fromkeys(("M", "K", "R", "steps", "parts", "threshold"), "i32"), "seed": "i64", "factor": "fp32"}
    parts = {"partial_ptr": "*fp32", "arrived_ptr": "*i32"}
    forward = {"x_ptr": "*bf16", "a_ptr": "*fp32", "out_ptr": "*bf16", **parts}
    backward = {"dxa_ptr": "*bf16", "x_ptr": "*bf16", "out_ptr": "*fp32", **parts}
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
                LAUNCHES[row],
                constants={**LAUNCHES[row].constants, "DROP": drops, "EIGHTS": True, "SPLIT": True, "BR": BR},
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
