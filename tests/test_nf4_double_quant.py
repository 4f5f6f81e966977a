"""The scales of the scales: exact nearest codes, the bound they keep, and degenerate vectors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf4 import dequantize_absmax, dynamic_map, quantize_absmax

GAPS = dynamic_map().diff()


@st.composite
def scales(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    values = torch.rand(draw(st.integers(1, 700)), generator=generator) * 10.0 ** draw(st.integers(-5, 5))
    if draw(st.booleans()):  # what a signed search finds
        values *= torch.randn(len(values), generator=generator).sign()
    return values


@given(absmax=scales(), size=st.sampled_from([1, 5, 64, 256, 10**15]))
def test_a_code_is_the_exact_nearest_entry(absmax, size):
    codes, nested_absmax, offset = quantize_absmax(absmax, size)
    scale = nested_absmax.double().repeat_interleave(min(size, len(absmax)))[: len(absmax)]
    target = (absmax - offset).double() / scale.clamp_min(1e-300)
    distance = (target[:, None] - dynamic_map().double()).abs()
    assert torch.equal(distance.gather(1, codes.long()[:, None])[:, 0], distance.amin(dim=1))


@given(absmax=scales(), size=st.sampled_from([1, 5, 64, 256, 10**15]))
def test_a_scale_moves_by_no_more_than_half_the_widest_gap(absmax, size):
    codes, nested_absmax, offset = quantize_absmax(absmax, size)
    back = dequantize_absmax(codes, nested_absmax, offset, size)
    scale = nested_absmax.repeat_interleave(min(size, len(absmax)))[: len(absmax)]
    bound = GAPS.max() / 2 * scale + 2e-7 * (absmax.abs() + offset.abs() + scale)
    assert ((back - absmax).abs() <= bound).all()


@given(value=st.floats(2.0**-20, 2.0**20, width=32), n=st.integers(1, 600))
def test_equal_scales_survive_almost_exactly(value, n):
    absmax = torch.full((n,), value)
    back = dequantize_absmax(*quantize_absmax(absmax))
    torch.testing.assert_close(back, absmax, rtol=1e-6, atol=0)


def test_a_scale_of_minus_one_takes_the_nearest_entry_there_is():
    # Two scales: deviations from their mean are +d and -d; +1 is an entry and -1 is not.
    codes, nested_absmax, offset = quantize_absmax(torch.tensor([3.0, 1.0]))
    assert (codes.tolist(), nested_absmax.tolist(), offset.item()) == ([255, 0], [1.0], 2.0)
    assert dequantize_absmax(codes, nested_absmax, offset).tolist() == [3.0, (2 + dynamic_map()[0]).item()]


def test_no_scales_have_no_codes():
    codes, nested_absmax, offset = quantize_absmax(torch.zeros(0))
    assert (len(codes), len(nested_absmax), offset.item()) == (0, 0, 0)
    assert len(dequantize_absmax(codes, nested_absmax, offset)) == 0


def test_second_level_scales_of_another_count_are_refused():
    codes, nested_absmax, offset = quantize_absmax(torch.rand(300))
    with pytest.raises(ValueError, match="300 scales in blocks of 256 have 2 second-level scales, but 1 came"):
        dequantize_absmax(codes, nested_absmax[:1], offset)
