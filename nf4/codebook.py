"""The values a stored code can stand for.

A weight is stored as the index of one of a few fixed levels between -1 and 1, times a scale that its block
shares. NormalFloat puts the levels where weights are: pretrained weights are close to normally distributed,
so NF4 takes evenly spaced quantiles of the normal distribution, seven on the negative side and eight on the
positive, with an exact zero between them. FP4 and the integers are the types the paper compares it with.

Levels are ascending, and the largest magnitude is 1. `fp4` alone keeps the order of its bits, as bitsandbytes
stores it: bit 3 is the sign, and code 8, minus zero, is stored as plain 0.
"""

from difflib import get_close_matches
from functools import lru_cache

import torch
from jaxtyping import Float, Int, Int32, UInt8
from scipy.special import ndtri
from torch import Tensor

CODEBOOKS = ("nf4", "nf2", "nf3", "nf8", "int4", "int8", "fp4", "fp4-e2m1", "fp4-e3m0")


def codebook(name: str) -> Float[Tensor, " levels"]:
    """The levels of a data type as float32, indexed by code; the caller's own copy.

    >>> codebook("nf2")
    tensor([-1.0000,  0.0000,  0.4358,  1.0000])
    """
    return levels_of(name).clone()


def code_bits(name: str) -> int:
    """How many bits one code takes: 15 levels take as many as 16."""
    return (len(levels_of(name)) - 1).bit_length()


def zero_code(name: str) -> int:
    """The code whose level is 0 (for fp4, which has two, the first)."""
    return levels_of(name).tolist().index(0.0)


def ascending(name: str) -> tuple[Float[Tensor, " levels"], Int[Tensor, " levels"]]:
    """The levels in ascending order and the code of each; equal levels keep the order of their codes."""
    return torch.sort(levels_of(name), stable=True)


def nearest_codes(values: Float[Tensor, " chunk"], name: str) -> UInt8[Tensor, " chunk"]:
    """The code of the level nearest to each value in [-1, 1]; halfway between two levels, the lower one.

    In ascending order a code is the number of midpoints strictly below the value. A table tells how many of
    them lie in lower cells of a fine grid, and which single one may lie in the value's own cell.
    """
    below, inside, codes = cell_table(name, values.device)
    cells = cell_of(values)
    nearest = below.index_select(0, cells)
    nearest += values > inside.index_select(0, cells)
    return nearest if codes is None else codes.index_select(0, nearest.int())


CELLS = 4096  # fine enough that no two midpoints of any codebook share a cell


def cell_of(values: Float[Tensor, " chunk"]) -> Int32[Tensor, " chunk"]:
    # Every step is monotone, so a value below a midpoint has a cell no higher than the midpoint's: that,
    # and not how exactly the cells are rounded, is what makes the table exact.
    return (values * (CELLS / 2)).add_(CELLS / 2).int()


@lru_cache
def cell_table(name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """For each cell, how many midpoints lie below it, and its own or infinity; codes, if not in order."""
    with torch.inference_mode(False), torch.device("cpu"):
        levels, codes = ascending(name)
        midpoints = (levels[:-1] + levels[1:]) / 2
        cells = cell_of(midpoints)
        assert len(cells.unique()) == len(cells)
        below = torch.bucketize(torch.arange(CELLS + 1), cells).to(torch.uint8)
        inside = torch.full((CELLS + 1,), torch.inf)
        inside[cells] = midpoints
        in_order = codes.equal(torch.arange(len(codes)))
        return below.to(device), inside.to(device), None if in_order else codes.to(device, torch.uint8)


def check_codebook(name: str) -> None:
    if name not in CODEBOOKS:
        close = get_close_matches(name.lower(), CODEBOOKS, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"there is no codebook {name!r}; {hint}the codebooks are {', '.join(CODEBOOKS)}")


@lru_cache
def levels_of(name: str) -> Float[Tensor, " levels"]:
    """One shared table for each type, for use inside this package, where nothing writes to it."""
    check_codebook(name)
    with torch.inference_mode(False), torch.device("cpu"):
        if name.startswith("nf"):
            return normal_float(int(name[2:]))
        if name.startswith("int"):
            largest = 2 ** (int(name[3:]) - 1) - 1  # symmetric: the code -8 of int4 has no counterpart
            return torch.arange(-largest, largest + 1, dtype=torch.float32) / largest
        if name == "fp4":
            # Eight magnitudes by their three bits (exponent 2, mantissa 1), the same with the sign bit.
            magnitudes = torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
            return torch.cat([magnitudes, 0 - magnitudes])  # 0 - 0 is +0, where -(0) would be -0
        magnitudes = (
            torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6]) / 6
            if name == "fp4-e2m1"
            else torch.tensor([2.0**exponent for exponent in range(-6, 1)])
        )
        return torch.cat([-magnitudes.flip(0), torch.zeros(1), magnitudes])


def normal_float(bits: int) -> Float[Tensor, " levels"]:
    """Quantiles of the normal distribution at evenly spaced probabilities, each side on its own, and zero.

    The probabilities run from `offset` to one half. The offset keeps the outermost quantile finite: it is the
    mean of 1 - 1/(2n) and 1 - 1/(2(n-1)), the outermost of n and of n-1 evenly spaced probabilities.
    """
    n = 2**bits
    # For four bits the published table was computed from the offset cut to seven digits.
    offset = 0.9677083 if bits == 4 else 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2
    # The published table was computed from probabilities on a float32 grid, and that decides its last bits:
    # a float64 grid changes 8 of the 16 levels. Which precision takes the quantiles of the grid makes no
    # difference to it; float32 like the grid, as the published code does.
    positive = torch.from_numpy(ndtri(torch.linspace(offset, 0.5, n // 2 + 1).numpy()))[:-1]
    negative = torch.from_numpy(-ndtri(torch.linspace(offset, 0.5, n // 2).numpy()))[:-1]
    levels = torch.cat([negative, torch.zeros(1), positive.flip(0)]).float()
    return levels / levels[-1]
