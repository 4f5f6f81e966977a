"""The levels: the published tables bit for bit, and what holds for all of them."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nf4 import CODEBOOKS, code_bits, codebook, dynamic_map
from nf4.codebook import ascending, nearest_codes, zero_code

NF4 = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
NF4_MIDPOINTS = (
    "bf591cd8 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff "
    "3df64862 3e5067e0 3e9582d4 3ec753f9 3f006d04 3f248daf 3f5c89da"
)
FP4 = "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000"
FP4_NEGATIVE = "00000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000"


def bits_of(levels):
    return " ".join(f"{value & 0xFFFFFFFF:08x}" for value in levels.view(torch.int32).tolist())


@pytest.mark.parametrize("name", CODEBOOKS)
def test_every_codebook_fills_the_unit_interval_and_has_an_exact_zero(name):
    levels = codebook(name)
    assert levels.dtype == torch.float32
    assert levels.abs().max() == 1
    assert levels[zero_code(name)] == 0
    assert 2 ** (code_bits(name) - 1) < len(levels) <= 2 ** code_bits(name)
    if name != "fp4":
        assert (levels.diff() > 0).all()


@given(name=st.sampled_from(CODEBOOKS), seed=st.integers(0, 1000))
def test_nearest_codes_are_nearest_and_ties_go_to_the_lower_level(name, seed):
    levels, codes = ascending(name)
    midpoints = (levels[:-1] + levels[1:]) / 2
    random = torch.rand(300, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    edges = torch.cat([midpoints, midpoints.nextafter(levels[1:]), midpoints.nextafter(levels[:-1])])
    values = torch.cat([random, levels, edges])
    expected = codes[(values[:, None] > midpoints).sum(dim=1)]
    assert torch.equal(nearest_codes(values, name).long(), expected)


def test_nf4_is_the_published_table_to_the_last_bit():
    assert bits_of(codebook("nf4")) == NF4


def test_nf4_boundaries_are_the_published_ones_to_the_last_bit():
    levels = codebook("nf4")
    assert bits_of((levels[:-1] + levels[1:]) / 2) == NF4_MIDPOINTS


def test_fp4_is_in_the_order_of_its_bits_with_entry_8_plus_zero():
    assert bits_of(codebook("fp4")) == f"{FP4} {FP4_NEGATIVE}"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_float_has_one_more_positive_level_than_negative(bits):
    levels = codebook(f"nf{bits}")
    assert len(levels) == 2**bits
    assert int((levels > 0).sum()) == 2 ** (bits - 1)
    assert int((levels < 0).sum()) == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_normal_float_levels_are_quantiles_of_the_normal_distribution(bits):
    n = 2**bits
    offset = 1 - (1 / (2 * n) + 1 / (2 * (n - 1))) / 2
    normal = torch.distributions.Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(0.5, offset, n // 2 + 1, dtype=torch.float64))
    negative = normal.icdf(torch.linspace(1 - offset, 0.5, n // 2, dtype=torch.float64))
    expected = torch.cat([negative, positive[1:]]) / positive[-1]
    torch.testing.assert_close(codebook(f"nf{bits}").double(), expected, atol=2e-6, rtol=0)


def test_integers_and_the_other_floats_are_what_their_names_say():
    assert torch.equal(codebook("int4"), torch.arange(-7, 8) / 7)
    assert torch.equal(codebook("int8"), torch.arange(-127, 128) / 127)
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
    assert torch.equal(codebook("fp4-e2m1"), torch.cat([-e2m1[1:].flip(0), e2m1]))
    e3m0 = torch.tensor([0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])
    assert torch.equal(codebook("fp4-e3m0"), torch.cat([-e3m0[1:].flip(0), e3m0]))


@pytest.mark.parametrize(
    ("signed", "sha256"),
    [
        (True, "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
        (False, "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"),
    ],
)
def test_the_dynamic_maps_are_the_published_ones(signed, sha256):
    assert hashlib.sha256(dynamic_map(signed).numpy().tobytes()).hexdigest() == sha256


@pytest.mark.parametrize("table", [lambda: codebook("nf4"), dynamic_map])
def test_writing_into_a_table_spoils_no_other(table):
    table().zero_()
    assert table().abs().max() == 1


def test_a_codebook_first_asked_for_in_inference_mode_serves_training():
    with torch.inference_mode():
        codebook("nf3")
    assert not codebook("nf3").is_inference()


@pytest.mark.parametrize(("name", "meant"), [("nf44", "nf4"), ("NF4", "nf4"), ("fp4_e2m1", "fp4-e2m1")])
def test_an_unknown_codebook_is_refused_with_the_one_that_was_meant(name, meant):
    with pytest.raises(ValueError, match=f"no codebook '{name}'.*did you mean '{meant}'"):
        codebook(name)


def test_a_codebook_like_no_other_is_refused_without_a_guess():
    with pytest.raises(ValueError, match=r"no codebook 'zzz'; the codebooks are nf4, nf2"):
        codebook("zzz")
