"""Lion in Triton: one launch for many tensors, one pass over each. The bits are the definition's."""

from collections.abc import Sequence

import triton
import triton.language as tl

from kernels.adamw import device_of, shipped_by_dtype
from kernels.launch import Launch, Shipped
from kernels.table_row import DTYPES, number, tensor, this_row, this_tile
from kernels.tensor_lists import accepts, grouped, launches
from kernels.updates import LionNumbers, Tensors

__all__ = ["accepts", "lion"]

LION = Launch({"TILE": 1024}, num_warps=4, fp_fusion=False)


def lion(params: Tensors, grads: Tensors, exp_avgs: Tensors, numbers: Sequence[LionNumbers]) -> None:
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of an average decides, one state remembers."""
    groups = grouped(params, grads, {"exp_avgs": exp_avgs}, numbers)
    for group, table, rows, tiles in launches(groups, LION.constants["TILE"], device_of(params)):
        dtypes = {"PARAM": DTYPES[group.param_dtype], "GRAD": DTYPES[group.grad_dtype]}
        lion_kernel[(len(rows),)](rows, tiles, table, **LION.options(**dtypes, ALIGNED=group.aligned))


@triton.jit
def lion_kernel(
    rows_ptr,  # (programs,)
    tiles_ptr,  # (programs,)
    table_ptr,  # (tensors, WORDS)
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
):
    row, start = this_row(rows_ptr, table_ptr), this_tile(tiles_ptr, TILE)
    if start + TILE <= tl.load(row):
        lion_tile(row, start, PARAM, GRAD, ALIGNED, TILE, False)
    else:
        lion_tile(row, start, PARAM, GRAD, ALIGNED, TILE, True)


@triton.jit
def lion_tile(
    row,
    start,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    RAGGED: tl.constexpr,
):
    i = start + tl.arange(0, TILE)
    inside = i < tl.load(row) if RAGGED else None  # a mask would keep loads from being wide
    p_ptr = tensor(row, 0, PARAM, ALIGNED) + i
    m_ptr = tensor(row, 2, tl.float32, ALIGNED) + i
    p, m = tl.load(p_ptr, mask=inside), tl.load(m_ptr, mask=inside)
    g = tl.load(tensor(row, 1, GRAD, ALIGNED) + i, mask=inside).to(tl.float32)

    average = m * number(row, 0) + g * number(row, 1)
    direction = (average > 0).to(tl.float32) - (average < 0).to(tl.float32)
    stepped = p.to(tl.float32) * number(row, 7) - direction * number(row, 4)
    tl.store(p_ptr, stepped.to(PARAM), mask=inside)
    tl.store(m_ptr, m * number(row, 2) + g * number(row, 3), mask=inside)


def shipped() -> list[Shipped]:
    return shipped_by_dtype("lion", lion_kernel, LION, LION.constants["TILE"], {80: 72.0, 90: 76.5})
