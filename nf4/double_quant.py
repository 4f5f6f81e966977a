"""Double quantization: the scales are themselves stored in 8 bits.

A float32 scale for every 64 weights costs half a bit per weight. The scales of a weight are alike, so their
mean is taken out and what remains is stored as 8-bit codes, with one float32 scale per 256 of them: 8/64 +
32/(64 * 256), 0.127 bits per weight. The codes index the dynamic map, a data type for numbers whose
magnitude is not known beforehand: its leading zeros give the power of ten, the bits that are left a linear
fraction.
"""

from functools import lru_cache

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

Nested = tuple[UInt8[Tensor, " num_blocks"], Float[Tensor, " num_nested_blocks"], Float[Tensor, ""]]


def quantize_absmax(absmax: Float[Tensor, " num_blocks"], nested_block_size: int = 256) -> Nested:
    """Codes, second-level scales and offset of a vector of scales; each code is the exact nearest entry."""
    offset, centred = without_mean(absmax)
    nested_block_size = min(nested_block_size, max(len(absmax), 1))  # padding to more would only take memory
    padded = torch.nn.functional.pad(centred, (0, -len(absmax) % nested_block_size))
    blocks = padded.view(-1, nested_block_size)
    nested_absmax = blocks.abs().amax(dim=1)
    check_finite(absmax, nested_absmax)

    # In float64, so that no rounding carries a ratio across the midpoint between two entries.
    ratio = blocks.double() / nested_absmax.double().clamp_min(1e-300)[:, None]
    codes = torch.bucketize(ratio, entry_midpoints(absmax.device), out_int32=True)
    return codes.to(torch.uint8).view(-1)[: len(absmax)], nested_absmax, offset


def without_mean(absmax: Float[Tensor, " num_blocks"]) -> tuple[Float[Tensor, ""], Float[Tensor, " num_blocks"]]:
    """The mean scale, in float32 as bitsandbytes takes it, and what it leaves of each scale."""
    offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
    return offset, absmax - offset


def check_finite(absmax: Float[Tensor, " num_blocks"], nested_absmax: Float[Tensor, " num_nested_blocks"]) -> None:
    if not nested_absmax.isfinite().all():
        raise ValueError(
            f"double quantization takes the mean of the scales in float32, and scales up to "
            f"{float(absmax.abs().max()):.3g} overflow it: store this weight with double_quant=False"
        )


def check_nested_sizes(
    codes: UInt8[Tensor, " num_blocks"], nested_absmax: Float[Tensor, " num_nested_blocks"], nested_block_size: int
) -> None:
    expected = -(-len(codes) // nested_block_size)
    if len(nested_absmax) != expected:
        raise ValueError(
            f"{len(codes)} scales in blocks of {nested_block_size} have {expected} second-level scales, "
            f"but {len(nested_absmax)} came"
        )


def dequantize_absmax(
    codes: UInt8[Tensor, " num_blocks"],
    nested_absmax: Float[Tensor, " num_nested_blocks"],
    offset: Float[Tensor, ""],
    nested_block_size: int = 256,
) -> Float[Tensor, " num_blocks"]:
    """The float32 scales that are stored: entry times second-level scale, then plus offset, each rounded."""
    check_nested_sizes(codes, nested_absmax, nested_block_size)
    nested_block_size = min(nested_block_size, max(len(codes), 1))
    entries = map_on(codes.device).index_select(0, codes.int())
    padded = torch.nn.functional.pad(entries, (0, -len(codes) % nested_block_size))
    centred = padded.view(-1, nested_block_size) * nested_absmax[:, None]
    return centred.view(-1)[: len(codes)] + offset


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
def map_on(device: torch.device) -> Float[Tensor, "256"]:
    """The signed map, kept on each device that has asked for it."""
    with torch.inference_mode(False), torch.device("cpu"):
        return dynamic_map(signed=True).to(device)


@lru_cache
def entry_midpoints(device: torch.device) -> Float64[Tensor, "255"]:
    """Halfway between neighbours of the signed map, exactly."""
    with torch.inference_mode(False), torch.device("cpu"):
        entries = dynamic_map(signed=True).double()
        return ((entries[:-1] + entries[1:]) / 2).to(device)
