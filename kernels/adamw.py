"""AdamW in Triton, with float32 states: one launch for many tensors, one pass over each.

The bits are the definition's: nothing is fused, and roots and quotients are rounded correctly.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.launch import Launch, Shipped
from kernels.table_row import DTYPES, SHORT, TABLES, number, tensor, this_row, this_tile
from kernels.tensor_lists import accepts, grouped, launches
from kernels.updates import AdamWNumbers, Tensors

__all__ = ["accepts", "adamw"]

ADAMW = Launch({"TILE": 1024}, num_warps=4, fp_fusion=False)


def adamw(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, numbers: Sequence[AdamWNumbers]
) -> None:
    """AdamW (Loshchilov and Hutter 2019) with float32 states."""
    groups = grouped(params, grads, {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}, numbers)
    for group, table, rows, tiles in launches(groups, ADAMW.constants["TILE"], device_of(params)):
        dtypes = {"PARAM": DTYPES[group.param_dtype], "GRAD": DTYPES[group.grad_dtype]}
        adamw_kernel[(len(rows),)](rows, tiles, table, **ADAMW.options(**dtypes, ALIGNED=group.aligned))


def device_of(params: Tensors) -> torch.device:
    """Where the parameters are; without any there is nothing to launch anywhere."""
    return params[0].device if params else torch.device("cpu")


@triton.jit
def adamw_kernel(
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
        adamw_tile(row, start, PARAM, GRAD, ALIGNED, TILE, False)
    else:
        adamw_tile(row, start, PARAM, GRAD, ALIGNED, TILE, True)


@triton.jit
def adamw_tile(
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
    v_ptr = tensor(row, 4, tl.float32, ALIGNED) + i
    p, g = tl.load(p_ptr, mask=inside), tl.load(tensor(row, 1, GRAD, ALIGNED) + i, mask=inside)
    p, m, v = adamw_step(row, p, g, tl.load(m_ptr, mask=inside), tl.load(v_ptr, mask=inside))
    tl.store(p_ptr, p, mask=inside)
    tl.store(m_ptr, m, mask=inside)
    tl.store(v_ptr, v, mask=inside)


@triton.jit
def adamw_step(row, p, g, m, v):
    """The parameter, in its dtype, and both states after the step."""
    g = g.to(tl.float32)
    m = m * number(row, 0) + g * number(row, 1)
    v = v * number(row, 2) + g * g * number(row, 3)
    denominator = tl.sqrt_rn(v) * number(row, 5) + number(row, 6)
    stepped = p.to(tl.float32) * number(row, 7) - tl.div_rn(m, denominator) * number(row, 4)
    return stepped.to(p.dtype), m, v


def shipped() -> list[Shipped]:
    return shipped_by_dtype("adamw", adamw_kernel, ADAMW, ADAMW.constants["TILE"], {80: 164.5, 90: 165.5})


# What parameters and gradients usually are; the other pairs differ by a conversion.
FLOAT, BRAIN = torch.float32, torch.bfloat16
PAIRS = ((FLOAT, FLOAT), (BRAIN, FLOAT), (BRAIN, BRAIN))


def shipped_by_dtype(
    name: str,
    kernel: Any,
    launch: Launch,
    elements: int,
    instructions: dict[int, float],
    signature: dict[str, str] = TABLES,
) -> list[Shipped]:
    """A kernel for pairs of dtypes at addresses that allow for wide loads, and once at others.

    Instructions are those of both branches, whole tile and ragged one, of which a program takes one.
    """
    kernels = []
    for param, grad, aligned in [*((*pair, True) for pair in PAIRS), (FLOAT, FLOAT, False)]:
        dtypes = {"PARAM": DTYPES[param], "GRAD": DTYPES[grad], "ALIGNED": aligned}
        kernels.append(
            Shipped(
                name=f"{name} {SHORT[param]}, gradients {SHORT[grad]}{'' if aligned else ', unaligned'}",
                kernel=kernel,
                signature=signature,
                launch=replace(launch, constants={**launch.constants, **dtypes}),
                aligned=tuple(signature),
                weights_per_thread=elements / (32 * launch.num_warps) if aligned else None,
                instructions=instructions,
            )
        )
    return kernels
