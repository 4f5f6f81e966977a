"""From stored codes to levels inside a kernel: eight 4-bit codes at a time, by permuting bytes.

A thread holds 32 bits of stored bytes, eight consecutive weights. The 16 levels, rounded to 16 bits, are split into
their high and their low bytes: two tables of 16 bytes, four registers each, which are constants of the program. The
instruction `prmt` picks four bytes out of eight by four 3-bit indices, so for four codes two of them look up the
lower and the upper half of a table and a third one chooses by bit 3 of each code; two more put high and low bytes
together. That is two instructions a weight, where a table in memory takes four and a tree of selects more than ten.

Byte j of a word holds the weights 2j and 2j + 1, the earlier one in the high nibble, and comes out as one register:
the earlier level in its low half. Joined to a tile, pair j of word c stands in the columns j 2W + 2c and the next,
for W words: the order in which a matrix instruction wants its operand in registers, so nothing moves. Column p of a
tile is then weight `places(p)` of its group, and a product asks x for its features in that order.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Int16, Int32
from torch import Tensor

from kernels.launch import INTERPRET
from nf4 import QuantConfig, QuantizedTensor, code_bits, codebook
from nf4.dynamic import map_on

# Four codes with two tables: a is looked up for codes 0..7, b for 8..15, and m takes each byte from one of them.
HALF = """\
prmt.b32 a, k0, k1, s;
prmt.b32 b, k2, k3, s;
prmt.b32 h, a, b, m;
prmt.b32 a, k4, k5, s;
prmt.b32 b, k6, k7, s;
prmt.b32 l, a, b, m;
prmt.b32 ${first}, l, h, 0x4051;
prmt.b32 ${second}, l, h, 0x6273;
"""

DECODE = """\
.reg .b32 s, m, t, a, b, h, l;
and.b32 s, $4, 0x77777777;
shr.u32 t, $4, 1;
lop3.b32 m, t, 0x44444444, 0x32103210, 0xEA;
{lower}shr.u32 s, s, 16;
shr.u32 m, m, 16;
{upper}"""

# fma with -0 is a product rounded once, and unlike `mul` on two halves it exists before compute capability 9.
SCALE = {
    torch.bfloat16: "fma.rn.bf16x2 ${pair}, ${pair}, $5, z;\n",
    torch.float16: "fma.rn.f16x2 ${pair}, ${pair}, $5, z;\n",
}


@lru_cache
def decode_asm(name: str, dtype: torch.dtype, scaled: bool = False) -> str:
    """PTX that turns the word $4 into four pairs of levels $0..$3, times the pair $5 of scales if `scaled`."""
    lines = [f".reg .b32 k{i};\nmov.b32 k{i}, 0x{value:08x};\n" for i, value in enumerate(tables(name, dtype))]
    lines.append(DECODE.format(lower=HALF.format(first=0, second=1), upper=HALF.format(first=2, second=3)))
    if scaled:
        lines.append(".reg .b32 z;\nmov.b32 z, 0x80008000;\n")
        lines += [SCALE[dtype].format(pair=pair) for pair in range(4)]
    return "{\n" + "".join(lines) + "}"


DECODE_BY_TABLES = (
    "{\n"
    + "".join(f".reg .b32 k{i};\nmov.b32 k{i}, ${5 + i};\n" for i in range(8))
    + DECODE.format(lower=HALF.format(first=0, second=1), upper=HALF.format(first=2, second=3))
    + "}"
)
"""The same with the tables given as $5..$12, so that they stay in registers: as constants they are moved there anew for
every word, one instruction a weight."""


@lru_cache
def tables(name: str, dtype: torch.dtype) -> tuple[int, ...]:
    """Both tables of 16 bytes as four registers each: the high bytes of the levels, then the low ones."""
    bits = level_bits(name, dtype).tolist()
    planes = [[(bits[code] >> shift) & 0xFF for code in range(16)] for shift in (8, 0)]
    return tuple(sum(plane[code + i] << 8 * i for i in range(4)) for plane in planes for code in range(0, 16, 4))


@lru_cache
def tables_on(name: str, dtype: torch.dtype, device: torch.device) -> Int32[Tensor, "8"]:
    with torch.inference_mode(False):
        return torch.tensor(tables(name, dtype), dtype=torch.uint32).view(torch.int32).to(device)


@lru_cache
def level_bits(name: str, dtype: torch.dtype) -> Int16[Tensor, "16"]:
    """The bits of a codebook's levels in 16 bits; a code that it does not use has NaN."""
    levels = codebook(name)
    padded = torch.cat([levels, levels.new_full((16 - len(levels),), torch.nan)])
    return padded.to(dtype).view(torch.int16)


def decodable(q: QuantizedTensor) -> bool:
    """Whether kernels can take this weight in whole words: a matrix of 4-bit codes, its rows made of whole groups."""
    group = min(q.config.block_size, 64)  # weights decoded together, under one scale
    whole = len(q.shape) == 2 and q.shape[1] % group == 0 and q.config.block_size % group == 0 and group % 32 == 0
    return whole and code_bits(q.config.codebook) == 4 and q.packed.data_ptr() % 4 == 0 and 0 < q.numel < 2**35


def stored(q: QuantizedTensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What a kernel reads a weight from: words, scales, their map, their own scales, offset, levels."""
    levels = level_bits_on(q.config.codebook, dtype, q.device)
    words = q.packed.view(torch.int32)
    if q.absmax is not None:
        return words, q.absmax, q.absmax, q.absmax, q.absmax, levels  # the last three are not read
    assert q.absmax_codes is not None
    assert q.nested_absmax is not None
    assert q.absmax_offset is not None
    return words, q.absmax_codes, map_on(q.device), q.nested_absmax, q.absmax_offset, levels


STORED = {
    "words_ptr": "*i32",
    "scales_ptr": "*u8",
    "map_ptr": "*fp32",
    "nested_ptr": "*fp32",
    "offset_ptr": "*fp32",
    "levels_ptr": "*i16",
}


def constants(config: QuantConfig, dtype: torch.dtype, scaled: bool) -> dict[str, Any]:
    """What of a weight's config a kernel is compiled for."""
    group = min(config.block_size, 64)
    return {
        "ASM": decode_asm(config.codebook, dtype, scaled),
        "GROUP": group,
        "GROUPS": config.block_size // group,
        "NESTED": config.nested_block_size if config.double_quant else 0,
        "INTERPRET": INTERPRET,
    }


@lru_cache
def level_bits_on(name: str, dtype: torch.dtype, device: torch.device) -> Int16[Tensor, "16"]:
    with torch.inference_mode(False):
        return level_bits(name, dtype).to(device)


@triton.jit
def decoded(word, levels_ptr, ASM: tl.constexpr, INTERPRET: tl.constexpr):
    """Words (ROWS, W) of eight codes -> four (ROWS, W) of two levels in 16 bits each, packed in int32."""
    if INTERPRET:
        v0, v1 = level_pair(word, levels_ptr, 0), level_pair(word, levels_ptr, 1)
        v2, v3 = level_pair(word, levels_ptr, 2), level_pair(word, levels_ptr, 3)
    else:
        v0, v1, v2, v3 = tl.inline_asm_elementwise(
            ASM,  # pyrefly: ignore[bad-argument-type]
            "=&r,=&r,=&r,=&r,r",
            [word],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return v0, v1, v2, v3


@triton.jit
def decoded_by_tables(word, tables_ptr, levels_ptr, ASM: tl.constexpr, INTERPRET: tl.constexpr):
    """As `decoded`, with the tables in registers; for products that do not go through the matrix instruction."""
    if INTERPRET:
        v0, v1, v2, v3 = decoded(word, levels_ptr, ASM, INTERPRET)
    else:
        v0, v1, v2, v3 = tl.inline_asm_elementwise(
            ASM,  # pyrefly: ignore[bad-argument-type]
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [
                word,
                tl.load(tables_ptr),
                tl.load(tables_ptr + 1),
                tl.load(tables_ptr + 2),
                tl.load(tables_ptr + 3),
                tl.load(tables_ptr + 4),
                tl.load(tables_ptr + 5),
                tl.load(tables_ptr + 6),
                tl.load(tables_ptr + 7),
            ],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return v0, v1, v2, v3


@triton.jit
def decoded_scaled(word, scale, levels_ptr, DTYPE: tl.constexpr, ASM: tl.constexpr, INTERPRET: tl.constexpr):
    """The same, each level times the float32 scale (ROWS, 1) of its row: level and scale rounded, then the product."""
    bits = scale.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.int32)
    if INTERPRET:
        v0, v1, v2, v3 = decoded(word, levels_ptr, ASM, INTERPRET)
        v0, v1 = scaled_pair(v0, bits, DTYPE), scaled_pair(v1, bits, DTYPE)
        v2, v3 = scaled_pair(v2, bits, DTYPE), scaled_pair(v3, bits, DTYPE)
    else:
        v0, v1, v2, v3 = tl.inline_asm_elementwise(
            ASM,  # pyrefly: ignore[bad-argument-type]
            "=&r,=&r,=&r,=&r,r,r",
            [word, bits | (bits << 16)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return v0, v1, v2, v3


@triton.jit
def level_pair(word, levels_ptr, j: tl.constexpr):
    """What the PTX makes of byte j, from the table in memory."""
    early = tl.load(levels_ptr + ((word >> (8 * j + 4)) & 15)).to(tl.int32)
    late = tl.load(levels_ptr + ((word >> (8 * j)) & 15)).to(tl.int32)
    return (early & 0xFFFF) | (late << 16)


@triton.jit
def scaled_pair(pair, bits, DTYPE: tl.constexpr):
    scale = bits.to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
    low, high = low_half(pair).to(DTYPE, bitcast=True), high_half(pair).to(DTYPE, bitcast=True)
    low, high = (low.to(tl.float32) * scale).to(DTYPE), (high.to(tl.float32) * scale).to(DTYPE)
    late = high.to(tl.uint16, bitcast=True).to(tl.int32) << 16
    return low.to(tl.uint16, bitcast=True).to(tl.int32) | late


@triton.jit
def low_half(pair):
    return (pair & 0xFFFF).to(tl.uint16)


@triton.jit
def high_half(pair):
    return ((pair >> 16) & 0xFFFF).to(tl.uint16)


@triton.jit
def tile(v0, v1, v2, v3):
    """Four (ROWS, W) of packed halves -> (ROWS, 8W): half h of word c of the j-th stands in column j 2W + 2c + h."""
    p0, p1 = tl.join(low_half(v0), high_half(v0)), tl.join(low_half(v1), high_half(v1))  # (ROWS, W, 2)
    p2, p3 = tl.join(low_half(v2), high_half(v2)), tl.join(low_half(v3), high_half(v3))
    joined = tl.join(tl.join(p0, p2), tl.join(p1, p3))  # (ROWS, W, h, high bit of j, low bit of j)
    return tl.reshape(tl.permute(joined, (0, 3, 4, 1, 2)), (v0.shape[0], 8 * v0.shape[1]))


@triton.jit
def places(W: tl.constexpr):
    """(8W,): where in its group of 8W weights the weight of each column of a tile stands."""
    column = tl.arange(0, 8 * W)
    place = (column % (2 * W)) // 2 * 8 + column // (2 * W) * 2 + column % 2
    return tl.max_contiguous(tl.multiple_of(place, 2), 2)  # in pairs, so that x moves 32 bits at a time


@triton.jit
def block_scale(block, scales_ptr, map_ptr, nested_ptr, offset, NESTED: tl.constexpr):
    """The float32 scale of each block: stored as it is if NESTED is 0, else in 8 bits with a scale per NESTED."""
    scale = tl.load(scales_ptr + block)
    if NESTED != 0:
        scale = tl.load(map_ptr + scale.to(tl.int32)) * tl.load(nested_ptr + block // NESTED) + offset
    return scale
