"""Codes to levels by permuting bytes: the inline PTX in an emulator, and its place in Triton's interpreter."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kernels import decode
from kernels.decode import decodable, decode_asm, level_bits
from nf4 import CODEBOOKS, QuantConfig, code_bits, codebook, dequantize, quantize
from tests import ptx
from tests.products import launch

FOUR_BITS = [name for name in CODEBOOKS if code_bits(name) == 4]
DTYPES = [torch.bfloat16, torch.float16]


def words_to_try() -> np.ndarray:
    """All 65,536 quadruples of codes in either half of a word, and random words."""
    quadruples = np.arange(2**16, dtype=np.uint32)
    random = np.random.default_rng(0).integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32)
    return np.concatenate([quadruples, quadruples << np.uint32(16), random])


def expected_levels(words: np.ndarray, name: str, dtype: torch.dtype) -> torch.Tensor:
    """(words, 8): the levels of the bytes in order, the high nibble first, rounded by torch; NaN where unused."""
    levels = codebook(name)
    levels = torch.cat([levels, torch.full((16 - len(levels),), torch.nan)]).to(dtype)
    stored = torch.from_numpy(words.view(np.uint8).reshape(-1, 4).astype(np.int64))
    return levels[torch.stack([stored >> 4, stored & 15], dim=2).view(-1, 8)]


def pairs(outputs: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
    """(words, 8): the halves of four registers in order, the low one first."""
    return torch.from_numpy(np.stack(outputs, axis=1).view(np.int16).copy()).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FOUR_BITS)
def test_ptx_decodes_every_quadruple_of_codes(name, dtype):
    words = words_to_try()
    outputs = ptx.run(decode_asm(name, dtype), {"$4": words}, ["$0", "$1", "$2", "$3"])
    torch.testing.assert_close(
        pairs(outputs, dtype), expected_levels(words, name, dtype), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FOUR_BITS)
def test_ptx_multiplies_by_the_scale_with_one_rounding(name, dtype):
    words = words_to_try()[::7].copy()
    scales = torch.randn(len(words), generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = scales.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    inputs = {"$4": words, "$5": bits | (bits << np.uint32(16))}
    outputs = ptx.run(decode_asm(name, dtype, scaled=True), inputs, ["$0", "$1", "$2", "$3"])
    products = expected_levels(words, name, dtype) * scales[:, None]
    torch.testing.assert_close(pairs(outputs, dtype), products, rtol=0, atol=0, equal_nan=True)


def test_the_emulator_knows_what_prmt_and_lop3_do():
    def word(value):
        return np.array([value], np.uint32)

    assert ptx.prmt(word(0x33221100), word(0x77665544), word(0x7520)) == word(0x77552200)
    assert ptx.prmt(word(0x00008000), word(0), word(0x0809)) == word(0x000000FF)  # bit 3: eight times the sign
    assert ptx.lop3(word(0b1100), word(0b1010), word(0b0001), word(0xEA)) == word(0b1001)  # (a and b) or c
    with pytest.raises(KeyError, match="add"):
        ptx.run("{\nadd.u32 $0, $1, $1;\n}", {"$1": word(1)}, ["$0"])
    with pytest.raises(ValueError, match="declared before it is written, but k was not"):
        ptx.run("{\nmov.b32 k, $1;\n}", {"$1": word(1)}, ["$0"])


@triton.jit
def decode_kernel(words_ptr, levels_ptr, places_ptr, out_ptr, ASM: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr):
    row, word = tl.arange(0, ROWS), tl.arange(0, W)
    words = tl.load(words_ptr + row[:, None] * W + word[None, :])
    v0, v1, v2, v3 = decode.decoded(words, levels_ptr, ASM, True)
    bits = decode.tile(v0, v1, v2, v3)
    place = decode.places(W)
    tl.store(places_ptr + tl.arange(0, 8 * W), place)
    tl.store(out_ptr + row[:, None] * (8 * W) + place[None, :], bits.to(tl.int16, bitcast=True))


@pytest.mark.parametrize("W", [4, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_columns_of_a_tile_are_a_permutation_that_places_undoes(dtype, W):
    words = torch.randint(-(2**31), 2**31, (4, W), generator=torch.Generator().manual_seed(W)).int()
    places = torch.full((8 * W,), -1, dtype=torch.int32)
    out = torch.zeros(4, 8 * W, dtype=torch.int16)
    launch(decode_kernel, words, level_bits("nf4", dtype), places, out, ASM="", W=W, ROWS=4)
    assert sorted(places.tolist()) == list(range(8 * W))
    torch.testing.assert_close(
        out.view(dtype).view(-1, 8), expected_levels(words.numpy().view(np.uint32).ravel(), "nf4", dtype)
    )


@triton.jit
def scale_kernel(scales_ptr, map_ptr, nested_ptr, offset_ptr, out_ptr, NESTED: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.arange(0, BLOCKS)
    offset = 0.0
    if NESTED != 0:
        offset = tl.load(offset_ptr)
    tl.store(out_ptr + block, decode.block_scale(block, scales_ptr, map_ptr, nested_ptr, offset, NESTED))


@pytest.mark.parametrize("nested", [0, 5, 256])
def test_scales_are_those_of_the_format(nested):
    config = QuantConfig(double_quant=nested > 0, nested_block_size=nested or 256)
    q = quantize(torch.randn(64, 512, generator=torch.Generator().manual_seed(1)), config)
    out = torch.full((512,), torch.nan)
    _, scales, table, nested_absmax, offset, _ = decode.stored(q, torch.bfloat16)
    arguments = (scales, table, nested_absmax, offset, out)
    launch(scale_kernel, *arguments, NESTED=nested, BLOCKS=512, enable_fp_fusion=False)  # each step is rounded
    assert torch.equal(out, q.scales)


def test_weights_in_whole_words_are_decodable_and_others_are_not():
    def stored(rows=16, columns=128, **config):
        return quantize(torch.zeros(rows, columns), QuantConfig(**config))

    for block_size in (32, 64, 128, 256, 192):
        assert decodable(stored(block_size=block_size))
    assert decodable(stored(columns=96, block_size=32))
    assert not decodable(stored(columns=96))  # rows of one and a half groups
    assert not decodable(stored(block_size=16))
    assert not decodable(stored(block_size=96))
    assert not decodable(stored(rows=0))
    assert not decodable(stored(codebook="int8"))
    assert not decodable(quantize(torch.zeros(4, 4, 64)))
    assert not decodable(quantize(torch.zeros(512)))


def test_stored_tensors_share_memory_with_the_weight():
    q = quantize(torch.randn(8, 64))
    words, scales, *_ = decode.stored(q, torch.float16)
    assert words.data_ptr() == q.packed.data_ptr()
    assert scales is q.absmax_codes
    assert dequantize(q).isfinite().all()
