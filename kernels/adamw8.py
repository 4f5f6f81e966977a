"""AdamW in Triton, with states of 8 bits: blocks of 256 are decoded, updated and encoded in registers.

One launch for many tensors; the bits are the definition's. A code is found as kernels/dynamic_buckets.py says, by one
look at a table and one comparison in float64, which takes fewer instructions than eight halvings.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kernels import dynamic_buckets, updates
from kernels.adamw import adamw_step, device_of, shipped_by_dtype
from kernels.dynamic_buckets import bucket_tables
from kernels.launch import Launch, Shipped
from kernels.table_row import DTYPES, TABLES, tensor, this_row, this_tile
from kernels.tensor_lists import STATES_8BIT, accepts, grouped, launches
from kernels.updates import AdamWNumbers, Tensors
from nf4.dynamic import map_on

__all__ = ["accepts", "adamw_8bit"]

ADAMW8 = Launch({"BLOCKS": 4}, num_warps=4, fp_fusion=False)

STATE_BLOCK = tl.constexpr(updates.STATE_BLOCK)
SHIFT = tl.constexpr(dynamic_buckets.SHIFT)
LOWEST = tl.constexpr(dynamic_buckets.LOWEST)
BUCKETS = tl.constexpr(dynamic_buckets.BUCKETS)


def adamw_8bit(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_absmaxes: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_sq_absmaxes: Tensors,
    numbers: Sequence[AdamWNumbers],
) -> None:
    """The same with states of 8 bits: signed entries for the mean of gradients, unsigned ones for that of squares."""
    lists = exp_avgs, exp_avg_absmaxes, exp_avg_sqs, exp_avg_sq_absmaxes
    states = dict(zip(STATES_8BIT, lists, strict=True))
    groups, device = grouped(params, grads, states, numbers, eight_bits=True), device_of(params)
    for group, table, rows, tiles in launches(groups, ADAMW8.constants["BLOCKS"] * updates.STATE_BLOCK, device):
        dtypes = {"PARAM": DTYPES[group.param_dtype], "GRAD": DTYPES[group.grad_dtype]}
        options = ADAMW8.options(**dtypes, ALIGNED=group.aligned)
        adamw_8bit_kernel[(len(rows),)](rows, tiles, table, **maps_on(device), **options)


def maps_on(device: torch.device) -> dict[str, Any]:
    """Entries, midpoints and buckets of the signed map and of the unsigned one, as the kernel calls them."""
    maps = {}
    for state, signed in (("m", True), ("v", False)):
        below, midpoints = bucket_tables(device, signed)
        tensors = {"entries": map_on(device, signed), "midpoints": midpoints, "below": below}
        maps |= {f"{state}_{name}_ptr": tensor for name, tensor in tensors.items()}
    return maps


@triton.jit
def adamw_8bit_kernel(
    rows_ptr,  # (programs,)
    tiles_ptr,  # (programs,)
    table_ptr,  # (tensors, WORDS)
    m_entries_ptr,  # (256,)
    m_midpoints_ptr,  # (256,) float64
    m_below_ptr,  # (2 BUCKETS,)
    v_entries_ptr,  # (256,)
    v_midpoints_ptr,  # (256,) float64
    v_below_ptr,  # (2 BUCKETS,)
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    m_map = (m_entries_ptr, m_midpoints_ptr, m_below_ptr)
    v_map = (v_entries_ptr, v_midpoints_ptr, v_below_ptr)
    row, start = this_row(rows_ptr, table_ptr), this_tile(tiles_ptr, BLOCKS * STATE_BLOCK)
    if start + BLOCKS * STATE_BLOCK <= tl.load(row):
        adamw_8bit_tile(row, start, m_map, v_map, PARAM, GRAD, ALIGNED, BLOCKS, False)
    else:
        adamw_8bit_tile(row, start, m_map, v_map, PARAM, GRAD, ALIGNED, BLOCKS, True)


@triton.jit
def adamw_8bit_tile(
    row,
    start,
    m_map,
    v_map,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    block = start // STATE_BLOCK + tl.arange(0, BLOCKS)
    i = start + tl.arange(0, BLOCKS)[:, None] * STATE_BLOCK + tl.arange(0, STATE_BLOCK)[None, :]
    inside = i < tl.load(row) if RAGGED else None  # a mask would keep loads from being wide
    begun = block * STATE_BLOCK < tl.load(row) if RAGGED else None

    p_ptr = tensor(row, 0, PARAM, ALIGNED) + i
    m_ptr, m_absmax_ptr = tensor(row, 2, tl.uint8, ALIGNED) + i, tensor(row, 3, tl.float32, ALIGNED) + block
    v_ptr, v_absmax_ptr = tensor(row, 4, tl.uint8, ALIGNED) + i, tensor(row, 5, tl.float32, ALIGNED) + block
    p, g = tl.load(p_ptr, mask=inside), tl.load(tensor(row, 1, GRAD, ALIGNED) + i, mask=inside)
    m = decode(m_ptr, m_absmax_ptr, m_map, inside, begun)
    v = decode(v_ptr, v_absmax_ptr, v_map, inside, begun)
    p, m, v = adamw_step(row, p, g, m, v)
    tl.store(p_ptr, p, mask=inside)
    encode(m, m_ptr, m_absmax_ptr, m_map, inside, begun, RAGGED)
    encode(v, v_ptr, v_absmax_ptr, v_map, inside, begun, RAGGED)


@triton.jit
def decode(codes_ptr, absmax_ptr, dynamic_map, inside, begun):
    """(BLOCKS, STATE_BLOCK): entry times absmax."""
    code = tl.load(codes_ptr, mask=inside).to(tl.int32)
    return tl.load(dynamic_map[0] + code) * tl.load(absmax_ptr, mask=begun)[:, None]


@triton.jit
def encode(x, codes_ptr, absmax_ptr, dynamic_map, inside, begun, RAGGED: tl.constexpr):
    """Store the codes of the nearest entries to x over its blocks' absmaxes, and those."""
    if RAGGED:
        x = tl.where(inside, x, 0.0)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # as bits, NaN is the largest
    absmax = tl.max(magnitude, axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax_ptr, absmax, mask=begun)

    shift = tl.where(absmax < 2.0**-60, 2.0**80, 1.0)  # a power of two keeps the reciprocal from overflowing
    divisor = tl.where(absmax == 0, 1.0, absmax * shift)
    ratio = x * shift[:, None] * tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)[:, None]
    bucket = ((ratio.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> SHIFT) - LOWEST
    bucket = tl.minimum(tl.maximum(bucket, 0), BUCKETS - 1) + tl.where(x < 0, BUCKETS, 0)
    below = tl.load(dynamic_map[2] + bucket).to(tl.int32)
    midpoint = tl.load(dynamic_map[1] + below) * absmax.to(tl.float64)[:, None]
    code = below + (x.to(tl.float64) > midpoint).to(tl.int32)
    code = tl.where(ratio == ratio, code, 255)  # infinity over itself, and all that NaN divides
    tl.store(codes_ptr, code.to(tl.uint8), mask=inside)


def shipped() -> list[Shipped]:
    types = {torch.float32: "*fp32", torch.float64: "*fp64", torch.uint8: "*u8"}
    maps = {name: types[tensor.dtype] for name, tensor in maps_on(torch.device("cpu")).items()}
    elements = ADAMW8.constants["BLOCKS"] * updates.STATE_BLOCK
    instructions = {80: 364.5, 90: 367.0}  # by Triton 3.6; 3.7 needs a fifth less
    return shipped_by_dtype(
        "adamw in 8 bits,", adamw_8bit_kernel, ADAMW8, elements, instructions, signature=TABLES | maps
    )
