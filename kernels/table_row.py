"""A row of the table in kernels/tensor_lists.py as a Triton kernel reads it: addresses become pointers.

A kernel is launched once for all tensors. Each program is told its row and which tile of that tensor is its own.
"""

import torch
import triton
import triton.language as tl

from kernels import tensor_lists

WORDS = tl.constexpr(tensor_lists.WORDS)
NUMBERS = tl.constexpr(tensor_lists.NUMBERS)
ALIGNMENT = tl.constexpr(tensor_lists.ALIGNMENT)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# What each program of a launch is handed: (programs,) rows and tiles, (tensors, WORDS) words.
TABLES = {"rows_ptr": "*i32", "tiles_ptr": "*i32", "table_ptr": "*i64"}


@triton.jit
def this_row(rows_ptr, table_ptr):
    """Where this program's row of the table begins, with the length of its tensor."""
    return table_ptr + tl.load(rows_ptr + tl.program_id(0)).to(tl.int64) * WORDS


@triton.jit
def this_tile(tiles_ptr, TILE: tl.constexpr):
    """The first element of this program's tile."""
    return tl.load(tiles_ptr + tl.program_id(0)).to(tl.int64) * TILE


@triton.jit
def tensor(row, word, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor at one of a row's six addresses: 0 the parameter, 1 its gradient, then states and their absmaxes."""
    pointer = tl.load(row + 1 + word).to(tl.pointer_type(DTYPE))  # pyrefly: ignore[bad-argument-type]
    if ALIGNED:
        pointer = tl.multiple_of(pointer, ALIGNMENT)
    return pointer


@triton.jit
def number(row, index):
    """One of a row's eight numbers."""
    return tl.load((row + NUMBERS).to(tl.pointer_type(tl.float32)) + index)
