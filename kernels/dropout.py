"""The mask of dropout as a function of a seed and an entry's place, so that no kernel need keep it.

Philox4x32-10 with the seed as its key hashes e // 8 to four 32-bit words, and each half of a word is the number of
one entry e: 16 bits decide whether it stays. A kernel that has a tile of x at hand makes the tile's numbers eight at
a time, some ten instructions an entry, where reading a mask would take memory and time to write it first.
M tokens, K inputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.launch import Launch, Shipped, ceil_div
from kernels.reference import threshold

DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
DROP = Launch({"TILE": 2048}, num_warps=4)


def accepts(x: Float[Tensor, "..."], *_: object) -> bool:
    """Whether this form drops entries of x: of any type a model computes in."""
    return x.dtype in DTYPES


def drop(x: Float[Tensor, "..."], dropout: float, seed: int | None) -> Float[Tensor, "..."]:
    """x with a share of its entries set to zero and the others scaled up, so that the mean stays."""
    if not dropout or seed is None:
        return x
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        grid = (ceil_div(x.numel(), DROP.constants["TILE"]),)
        drop_kernel[grid](x, out, x.numel(), seed, threshold(dropout), 1 / (1 - dropout), **DROP.options())
    return out


@triton.jit(do_not_specialize=["seed", "threshold"])
def drop_kernel(
    x_ptr,  # (n,)
    out_ptr,  # (n,)
    n,
    seed,
    threshold,
    factor,
    TILE: tl.constexpr,
):
    """TILE entries."""
    start = tl.program_id(0).to(tl.int64) * TILE
    e = start + tl.arange(0, TILE)
    number = numbers(seed, start // 8 + tl.arange(0, TILE // 8))
    x = tl.load(x_ptr + e, mask=e < n, other=0.0)
    scaled = (x.to(tl.float32) * factor).to(x.dtype)
    tl.store(out_ptr + e, tl.where(number >= threshold, scaled, tl.zeros_like(scaled)), mask=e < n)


@triton.jit
def numbers(seed, counter):
    """(..., C) counters, 64 bits each -> (..., 8 C) numbers below 2^16."""
    first, second, third, fourth = tl.randint4x(seed, counter)
    word = tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))  # (..., 4 C), in order
    return tl.interleave(word & 0xFFFF, word >> 16)


@triton.jit
def kept(seed, threshold, m, first, K, COLUMNS: tl.constexpr, EIGHTS: tl.constexpr):
    """Which entries of x (M, K) stay in the rows m and in COLUMNS columns from `first` on, a multiple of 8.

    With EIGHTS, K is a multiple of 8 and eight neighbours share a counter; else each entry hashes its own.
    """
    row = m.to(tl.int64)[:, None]
    if EIGHTS:
        number = numbers(seed, row * (K // 8) + (first // 8 + tl.arange(0, COLUMNS // 8))[None, :])
    else:
        e = row * K + (first + tl.arange(0, COLUMNS))[None, :]
        one, two, three, four = tl.randint4x(seed, e // 8)
        place = e % 8
        word = tl.where(place < 4, tl.where(place < 2, one, two), tl.where(place < 6, three, four))
        number = tl.where(place % 2 == 0, word & 0xFFFF, word >> 16)
    return number >= threshold


def dropping(dropout: float, seed: int | None) -> tuple[Any, ...]:
    """A kernel's seed, threshold and factor, and whether it drops at all."""
    if not dropout or seed is None:
        return 0, 0, 1.0, False
    return seed, threshold(dropout), 1 / (1 - dropout), True


def shipped() -> list[Shipped]:
    """What may be launched on real activations."""
    return [
        Shipped(
            name="drop",
            kernel=drop_kernel,
            signature={
                "x_ptr": "*bf16",
                "out_ptr": "*bf16",
                "n": "i32",
                "seed": "i64",
                "threshold": "i32",
                "factor": "fp32",
            },
            launch=DROP,
            aligned=("x_ptr", "out_ptr", "n"),
            weights_per_thread=DROP.constants["TILE"] / (32 * DROP.num_warps),
            instructions={80: 18.0, 90: 18.5},
        )
    ]
