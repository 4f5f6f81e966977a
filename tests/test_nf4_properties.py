"""What storing a weight promises whatever the weight: of layouts, dtypes, signs, and of scales in 8 bits."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from nf4 import QuantConfig, dequantize, dynamic_map, quantize
from nf4.codebook import ascending
from tests.strategies import block_sizes, codebooks, configs, weights


def assert_stored_alike(one, other):
    assert one.tensors().keys() == other.tensors().keys()
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


@settings(max_examples=60)
@given(weight=weights(), config=configs())
def test_a_weight_in_16_bits_is_stored_as_its_float32_value(weight, config):
    assert_stored_alike(quantize(weight, config), quantize(weight.float(), config))


@settings(max_examples=60)
@given(weight=weights(), config=configs())
def test_blocks_run_along_the_flattened_weight(weight, config):
    assert_stored_alike(quantize(weight, config), quantize(weight.flatten(), config))


@settings(max_examples=60)
@given(weight=weights(), config=configs(), blocks=st.integers(0, 9))
def test_a_weight_cut_between_two_blocks_is_its_two_parts(weight, config, blocks):
    config, flat, cut = replace(config, double_quant=False), weight.flatten(), blocks * config.block_size
    parts = [dequantize(quantize(part, config)) for part in (flat[:cut], flat[cut:])]
    assert torch.equal(torch.cat(parts), dequantize(quantize(flat, config)))


@settings(max_examples=40)
@given(weight=weights(), config=configs(scales=("absmax",)))
def test_scales_in_8_bits_change_no_code(weight, config):
    """So codes of permuted blocks are permuted, and all else that holds of codes, holds with them as well."""
    one, other = (quantize(weight, replace(config, double_quant=double_quant)) for double_quant in (False, True))
    assert torch.equal(one.packed, other.packed)


@settings(max_examples=60)
@given(weight=weights(), name=codebooks, block_size=block_sizes, nested_block_size=st.sampled_from([1, 5, 256]))
def test_scales_in_8_bits_move_a_weight_by_no_more_than_their_own_bound(weight, name, block_size, nested_block_size):
    q = quantize(weight, QuantConfig(name, block_size, True, nested_block_size))
    moved = (weight.float() - dequantize(q, torch.float32)).abs().flatten()
    absmax = quantize(weight, QuantConfig(name, block_size, False)).scales
    nested = q.tensors()["nested_absmax"].repeat_interleave(nested_block_size)[: len(absmax)]
    of_codes = ascending(name)[0].diff().max() / 2 * absmax
    of_scales = dynamic_map().diff().max() / 2 * nested
    rounding = 1e-5 * (absmax + nested + q.tensors()["absmax_offset"].abs())
    bound = (of_codes + of_scales + rounding).repeat_interleave(block_size)[: len(moved)]
    assert (moved <= bound).all()


@settings(max_examples=60)
@given(weight=weights(), name=codebooks, block_size=block_sizes)
def test_storing_again_what_came_back_in_its_own_dtype_changes_nothing(weight, name, block_size):
    config = QuantConfig(name, block_size, double_quant=False)
    once = quantize(weight, config)
    twice = quantize(dequantize(once), config)
    assert torch.equal(once.scales, twice.scales)
    assert torch.equal(dequantize(once), dequantize(twice))


@settings(max_examples=40)
@given(weight=weights(dtypes=(torch.float32,)), name=codebooks, block_size=block_sizes)
def test_a_signed_search_fits_a_weight_turned_round_as_well(weight, name, block_size):
    config = QuantConfig(name, block_size, double_quant=False, scale="search")
    errors = [float((each - dequantize(quantize(each, config))).double().norm()) for each in (weight, -weight)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02, abs=1e-9)


@settings(max_examples=60)
@given(weight=weights(), config=configs(scales=("absmax",)))
def test_the_fast_form_stores_the_same_bytes(weight, config):
    assert_stored_alike(kernels.quantize(weight, config), quantize(weight, config))
