"""Codes in bytes: a big-endian stream of bits, so that the earlier of two 4-bit codes has the high nibble."""

import math
from functools import lru_cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nf4.codebook import code_bits, levels_of


def pack(codes: UInt8[Tensor, " chunk"], bits: int, padding: int) -> UInt8[Tensor, " bytes"]:
    """Codes as a big-endian stream of bits; a last byte is filled up with the code of zero."""
    if bits == 8:
        return codes
    n = len(codes)
    if n % 8:
        codes = torch.cat([codes, codes.new_full((-n % 8,), padding)])
    if bits == 4:
        packed = (codes[::2] << 4) | codes[1::2]
    else:
        places = torch.arange(bits - 1, -1, -1, device=codes.device)
        stream = ((codes[:, None] >> places) & 1).view(-1, 8)  # eight codes of K bits are K bytes
        weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], device=codes.device)
        packed = (stream * weights).sum(dim=1).to(torch.uint8)
    return packed[: -(-n * bits // 8)]


def unpack(packed: UInt8[Tensor, " bytes"], table: Tensor, bits: int) -> Float[Tensor, " values"]:
    """The float32 levels of packed codes, with those of the padding."""
    if bits == 3:
        whole = torch.cat([packed, packed.new_zeros(-len(packed) % 3)]).view(-1, 3).int()
        word = whole[:, 0] << 16 | whole[:, 1] << 8 | whole[:, 2]  # 24 bits, eight codes
        codes = (word[:, None] >> torch.arange(21, -1, -3, device=packed.device)) & 7
        return table.index_select(0, codes.view(-1)).view(-1)
    return table.index_select(0, packed.int()).view(torch.float32).view(-1)


@lru_cache
def unpack_table(name: str, device: torch.device) -> Tensor:
    """What each byte stands for: the levels of the codes in it.

    The two float32 levels of a byte of 4-bit codes are moved as one int64, which doubles the speed of the
    lookup. A code that the data type does not use decodes to NaN.
    """
    bits, levels = code_bits(name), levels_of(name)
    with torch.inference_mode(False), torch.device("cpu"):
        levels = torch.cat([levels, torch.full((2**bits - len(levels),), math.nan)])
        if bits == 3:
            return levels.to(device)  # codes straddle bytes: looked up one by one
        byte = torch.arange(256)
        table = torch.stack([levels[(byte >> shift) % 2**bits] for shift in range(8 - bits, -1, -bits)], dim=1)
        return (table.view(torch.int64).view(-1) if bits == 4 else table).to(device)


def largest_code(packed: UInt8[Tensor, " bytes"], bits: int) -> int:
    """The largest of the packed codes of 4 or 8 bits, those of the padding among them."""
    if bits == 8:
        return int(packed.max())
    assert bits == 4
    high, low = packed.max(), max(int((part & 15).max()) for part in packed.split(1 << 22))
    return max(int(high) >> 4, low)
