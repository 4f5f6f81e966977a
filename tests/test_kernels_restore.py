"""Decoding in one launch: bit for bit what nf4 decodes, wherever it is put."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nf4
from kernels.restore import LAUNCHES, accepts, candidates, dequantize, shipped
from nf4 import QuantConfig
from tests.strategies import block_sizes, weights

FOUR_BITS = ("nf4", "int4", "fp4", "fp4-e2m1", "fp4-e3m0")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def same_bits(a, b):
    """Equal values, and NaN where the other has it."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, dtype=dtype)


@settings(max_examples=60)
@given(
    weight=weights(),
    codebook=st.sampled_from(FOUR_BITS),
    block_size=block_sizes,
    double=st.booleans(),
    nested_block_size=st.sampled_from([1, 5, 256]),
    dtype=st.sampled_from(DTYPES),
)
def test_every_bit_is_the_definitions(weight, codebook, block_size, double, nested_block_size, dtype):
    q = nf4.quantize(weight, QuantConfig(codebook, block_size, double, nested_block_size))
    expected = nf4.dequantize(q, dtype)
    assert same_bits(dequantize(q, dtype), expected)
    out = poisoned(*q.shape, dtype=dtype)
    assert dequantize(q, dtype, out) is out
    assert same_bits(out, expected)


@pytest.mark.parametrize("columns", [10, 24, 37, 64])  # in the middle of a byte, a group, a block
@pytest.mark.parametrize("block_size", [3, 32, 64])
@pytest.mark.parametrize("double", [True, False])
def test_rows_of_a_wider_matrix_are_filled_and_their_neighbours_left_alone(columns, block_size, double):
    q = nf4.quantize(torch.randn(11, columns), QuantConfig(block_size=block_size, double_quant=double))
    wide = poisoned(11, columns + 16, dtype=torch.bfloat16)
    dequantize(q, torch.bfloat16, wide[:, :columns])
    assert torch.equal(wide[:, :columns], nf4.dequantize(q, torch.bfloat16))
    assert wide[:, columns:].isnan().all()


@pytest.mark.parametrize("shape", [(2, LAUNCHES["flat"].constants["TILE"] + 8), (3, 5, 999)])
def test_several_programs_meet_without_a_gap(shape):
    q = nf4.quantize(torch.randn(shape))
    assert torch.equal(dequantize(q), nf4.dequantize(q))
    if len(shape) == 2:
        wide = poisoned(shape[0], shape[1] + 8)
        dequantize(q, torch.float32, wide[:, : shape[1]])
        assert torch.equal(wide[:, : shape[1]], nf4.dequantize(q))


@pytest.mark.parametrize("codebook", FOUR_BITS)
def test_every_byte_stands_for_its_two_levels(codebook):
    config = QuantConfig(codebook, block_size=64, double_quant=False)
    q = replace(nf4.quantize(torch.ones(512), config), packed=torch.arange(256, dtype=torch.uint8))
    assert dequantize(q).isnan().any() == (len(nf4.codebook(codebook)) < 16)  # code 15 means nothing
    assert same_bits(dequantize(q), nf4.dequantize(q))


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0)])
def test_a_weight_without_elements_decodes_to_none(shape):
    assert dequantize(nf4.quantize(torch.zeros(shape)), torch.float16).shape == shape


def test_compiled_for_a_gpu_scales_are_rounded_twice_and_loads_and_stores_are_wide():
    """Entry times nested plus offset would be one fused operation, with another last bit, if the compiler might."""
    code = (
        "from benchmarks.aot import compile_for, disassemble\n"
        "from kernels.restore import shipped\n"
        "for s in shipped():\n"
        "    if '64, double' in s.name: print(disassemble(compile_for(s, 90).asm['cubin'])[0])"
    )
    listing = compiled(code)
    assert "FMUL" in listing
    assert "FADD" in listing
    assert "FFMA" not in listing
    assert "STG.E.128" in listing  # eight weights at once, from four bytes
    assert "STG.E " not in listing


def compiled(code):
    """What code prints in a process that compiles kernels instead of interpreting them."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_what_it_decodes_is_said_beforehand():
    for codebook in nf4.CODEBOOKS:
        q = nf4.quantize(torch.ones(8), QuantConfig(codebook))
        assert accepts(q) == (codebook in FOUR_BITS)
        assert not accepts(q, torch.float64)


def test_what_is_shipped_has_names_of_its_own_and_the_launches_of_the_table():
    names = [each.name for each in shipped()]
    assert len(names) == len(set(names))
    assert set(candidates()) == set(LAUNCHES)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"out": torch.zeros(8, 4)}, r"out must be torch.float32 of shape \(4, 8\) on cpu, not .* \(8, 4\) on cpu"),
        ({"out": torch.zeros(4, 8), "dtype": torch.float16}, "out must be torch.float16"),
        ({"out": torch.zeros(8, 4).T}, r"contiguous or rows of a wider matrix, but its strides are \(1, 4\)"),
        ({"out": torch.zeros(1, 8).expand(4, 8)}, r"its strides are \(0, 1\)"),
        ({"packed": torch.zeros(15, dtype=torch.uint8)}, "has 16 bytes .* and 1 scales, but 15 bytes and 1 scales"),
        ({"absmax_codes": torch.zeros(2, dtype=torch.uint8)}, "has .* 1 scales, but 16 bytes and 2 scales came"),
        ({"nested_absmax": torch.zeros(2)}, "second-level scales"),
    ],
)
def test_what_does_not_fit_is_refused(change, problem):
    q = change.pop("q", None) or nf4.quantize(torch.ones(4, 8))
    dtype, out = change.pop("dtype", torch.float32), change.pop("out", None)
    with pytest.raises(ValueError, match=problem):
        dequantize(replace(q, **change), dtype, out)


def test_other_codebooks_and_types_are_left_to_the_definition():
    weight = torch.ones(4, 8)
    assert accepts(nf4.quantize(weight))
    assert not accepts(nf4.quantize(weight), torch.float64)
    assert not accepts(nf4.quantize(weight, QuantConfig("nf3")))
