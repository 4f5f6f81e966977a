"""Storing on a GPU: bit for bit what nf4 stores, or its refusal."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import nf4
from kernels import store
from nf4 import QuantConfig, blockwise
from tests.strategies import block_sizes, configs, weights

FOUR_BITS = ("nf4", "int4", "fp4", "fp4-e2m1", "fp4-e3m0")


def assert_same(ours, theirs):
    assert (ours.shape, ours.dtype, ours.config) == (theirs.shape, theirs.dtype, theirs.config)
    assert ours.tensors().keys() == theirs.tensors().keys()
    for name, tensor in theirs.tensors().items():
        assert ours.tensors()[name].dtype == tensor.dtype
        assert torch.equal(ours.tensors()[name], tensor), name


@settings(max_examples=80)
@given(weight=weights(), config=configs(scales=("absmax",)), codebook=st.sampled_from(FOUR_BITS))
def test_every_stored_bit_is_the_definitions(weight, config, codebook):
    config = replace(config, codebook=codebook)
    assume(weight.numel())
    assert store.accepts(weight, config)
    assert_same(store.quantize(weight, config), nf4.quantize(weight, config))


@pytest.mark.parametrize("codebook", FOUR_BITS)
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.3])
def test_halfway_between_two_levels_the_lower_one_is_taken(codebook, scale):
    levels = nf4.codebook(codebook).sort().values
    middle = (levels[:-1] + levels[1:]) / 2
    values = torch.cat([middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0))])
    weight = torch.cat([values, torch.ones(64 - len(values))]) * scale
    for partial in (weight, weight[:-1]):  # multiplied by the reciprocal, and divided
        config = QuantConfig(codebook, double_quant=False)
        assert_same(store.quantize(partial, config), nf4.quantize(partial, config))


@pytest.mark.parametrize("n", [64, 40, 104, 63])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 3e-38, 3e38])
def test_blocks_of_zeros_and_of_the_smallest_and_largest_numbers(n, size):
    weight = torch.linspace(-1, 1, n) * size
    for codebook in FOUR_BITS:
        config = QuantConfig(codebook, double_quant=False)
        assert_same(store.quantize(weight, config), nf4.quantize(weight, config))


def test_several_programs_meet_without_a_gap():
    weight = torch.randn(3, 4099)
    for config in (QuantConfig(), QuantConfig(block_size=256, nested_block_size=16), QuantConfig(block_size=7)):
        assert_same(store.quantize(weight, config), nf4.quantize(weight, config))
    strided = torch.randn(70, 33).T
    assert_same(store.quantize(strided), nf4.quantize(strided))


@settings(max_examples=30)
@given(
    n=st.integers(1, 700),
    nested_block_size=st.sampled_from([1, 3, 64, 256, 1000]),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    spread=st.sampled_from([0.0, 1e-7, 1.0]),
    seed=st.integers(0, 99),
)
def test_scales_take_the_exact_nearest_entry(n, nested_block_size, size, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    absmax = size * (1 + spread * torch.rand(n, generator=generator))
    for ours, theirs in zip(
        store.quantize_absmax(absmax, nested_block_size), nf4.quantize_absmax(absmax, nested_block_size), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_scales_on_both_sides_of_every_midpoint_take_the_right_entry():
    """The mean is 0 and the largest magnitude 1, so that each scale is its own ratio."""
    entries = nf4.dynamic_map().double()
    middle = ((entries[:-1] + entries[1:]) / 2).float()
    around = [middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0))]
    positive = torch.cat([*around, torch.ones(1)])
    absmax = torch.stack([positive, -positive], dim=1).view(-1)  # its sum is exactly 0 in any order of pairs
    codes, nested, offset = store.quantize_absmax(absmax, 4096)
    expected = nf4.quantize_absmax(absmax, 4096)
    assert torch.equal(codes, expected[0])
    assert len(codes.unique()) > 250
    assert torch.equal(nested, expected[1])
    assert torch.equal(offset, expected[2])


@given(seed=st.integers(0, 99), block_size=block_sizes)
@settings(max_examples=10)
def test_codes_go_by_whatever_scales_they_are_given(seed, block_size):
    """Scales that were searched for may be negative, or far from the largest magnitude."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(333, generator=generator)
    scales = torch.randn(-(-333 // block_size), generator=generator)
    scales[0] = -0.0
    config = QuantConfig("fp4", block_size)
    assert torch.equal(store.encode(flat, scales, config), blockwise.encode(flat, scales, config))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("at", [(0, 0), (2, 70), (4, 99)])
def test_a_weight_that_is_not_finite_is_refused_in_nf4s_words(value, dtype, at):
    weight = torch.randn(5, 100).to(dtype)
    weight[at] = value
    with pytest.raises(ValueError, match="only finite weights") as theirs:
        nf4.quantize(weight, name="layer.weight")
    with pytest.raises(ValueError, match=r"layer\.weight is") as ours:
        store.quantize(weight, name="layer.weight")
    assert str(ours.value) == str(theirs.value)


def test_scales_whose_mean_overflows_are_refused_in_nf4s_words():
    refused = pytest.raises(ValueError, match="store this weight with double_quant=False")
    with np.errstate(invalid="ignore"), refused:  # the interpreter warns of infinity over infinity
        store.quantize(torch.full((4, 64), 3e38))


@pytest.mark.parametrize(
    ("weight", "config"),
    [
        (torch.randn(4, 64), QuantConfig("nf3")),
        (torch.randn(4, 64), QuantConfig("int8")),
        (torch.randn(4, 64), QuantConfig(block_size=5000)),
        (torch.randn(4, 64), QuantConfig(nested_block_size=5000)),
        (torch.zeros(0, 64), QuantConfig()),
    ],
)
def test_what_it_does_not_take_is_left_to_nf4(weight, config):
    assert not store.accepts(weight, config)


@pytest.mark.parametrize("double_quant", [False, True])
def test_searched_scales_are_nf4s_and_so_are_the_codes(double_quant):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    config = QuantConfig(scale="search", double_quant=double_quant)
    assert_same(store.quantize(weight, config), nf4.quantize(weight, config))


def test_a_weight_of_another_type_is_refused_in_nf4s_words():
    assert not store.accepts(torch.zeros(64, dtype=torch.float64), QuantConfig())
    with pytest.raises(ValueError, match="must be float32, float16 or bfloat16"):
        store.quantize(torch.zeros(64, dtype=torch.float64))


def test_what_is_shipped_has_names_of_its_own():
    names = [each.name for each in store.shipped()]
    assert len(names) == len(set(names)) == 6
