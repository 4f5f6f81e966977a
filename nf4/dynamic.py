"""The dynamic map: 8 bits for numbers whose magnitude is not known beforehand, in blocks with one scale each.

Its leading zeros give the power of ten, the bits that are left a linear fraction (Dettmers 2015, arXiv:1511.04561).
Scales of scales are stored so, and the states of 8-bit optimizers (Dettmers et al. 2021, arXiv:2110.02861).
"""

from functools import lru_cache

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor


def quantize_dynamic(
    values: Float[Tensor, " n"], block_size: int = 256, signed: bool = True
) -> tuple[UInt8[Tensor, " n"], Float[Tensor, " num_blocks"]]:
    """The codes of the entries nearest to each value over its block's absmax, and every absmax, in float32.

    The last block may be partial. A value halfway between two entries takes the lower one, and a block of zeros the
    code of zero; its absmax is 0.
    """
    block_size = min(block_size, max(len(values), 1))  # padding to more would only take memory
    blocks = torch.nn.functional.pad(values, (0, -len(values) % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    # In float64, so that no rounding carries a ratio across the midpoint between two entries.
    ratio = blocks.double() / absmax.double().clamp_min(1e-300)[:, None]
    codes = torch.bucketize(ratio, entry_midpoints(values.device, signed), out_int32=True)
    return codes.to(torch.uint8).view(-1)[: len(values)], absmax


def dequantize_dynamic(
    codes: UInt8[Tensor, " n"],
    absmax: Float[Tensor, " num_blocks"],
    block_size: int = 256,
    signed: bool = True,
) -> Float[Tensor, " n"]:
    """The float32 values that are stored: entry times absmax, rounded once."""
    block_size = min(block_size, max(len(codes), 1))
    entries = map_on(codes.device, signed).index_select(0, codes.int())
    blocks = torch.nn.functional.pad(entries, (0, -len(codes) % block_size)).view(-1, block_size)
    return (blocks * absmax[:, None]).view(-1)[: len(codes)]


def dynamic_map(signed: bool = True) -> Float[Tensor, "256"]:
    """The 256 entries of the dynamic map, ascending; the unsigned one is for numbers that are never negative.

    For each power of ten from 10^-6 to 1 these are the midpoints of equal intervals of [0.1, 1], twice as
    many with each step up, where numbers are denser; then 0 and 1.
    """
    entries = [0.0, 1.0]
    for exponent in range(7):
        intervals = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, intervals + 1, dtype=torch.float32)
        middles = 10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        entries += middles.tolist()
        entries += (-middles).tolist() if signed else []
    return torch.tensor(sorted(entries), dtype=torch.float32)


@lru_cache
def map_on(device: torch.device, signed: bool = True) -> Float[Tensor, "256"]:
    """A map, kept on each device that has asked for it."""
    with torch.inference_mode(False), torch.device("cpu"):
        return dynamic_map(signed).to(device)


@lru_cache
def entry_midpoints(device: torch.device, signed: bool = True) -> Float64[Tensor, "255"]:
    """Halfway between neighbours of a map, exactly."""
    with torch.inference_mode(False), torch.device("cpu"):
        entries = dynamic_map(signed).double()
        return ((entries[:-1] + entries[1:]) / 2).to(device)
