"""What storing a weight lost, against the definition in float64."""

import math

import pytest
import torch
from hypothesis import given

from nf4 import dequantize, error, quantize
from tests.strategies import configs, weights


@given(weight=weights(), config=configs())
def test_the_figures_are_those_of_the_definition(weight, config):
    q = quantize(weight, config)
    difference = weight.double() - dequantize(q).double()
    found = error(weight, q)
    norm = weight.double().norm().item()
    assert found.mse == pytest.approx(difference.square().mean().item() if weight.numel() else 0, rel=1e-9)
    assert found.max == (difference.abs().max().item() if weight.numel() else 0)
    if norm:
        assert found.relative == pytest.approx(difference.norm().item() / norm, rel=1e-9)
    if found.relative:
        assert found.snr_db == pytest.approx(-20 * math.log10(found.relative))


def test_a_weight_without_error_has_infinite_snr():
    weight = torch.zeros(10)
    assert error(weight, quantize(weight)) == type(error(weight, quantize(weight)))(0.0, math.inf, 0.0, 0.0)


def test_a_searched_weight_has_the_smaller_error():
    from nf4 import QuantConfig

    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    plain, search = (error(weight, quantize(weight, QuantConfig(scale=scale))) for scale in ("absmax", "search"))
    assert search.relative < 0.92 * plain.relative
    assert search.snr_db > plain.snr_db + 0.7


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 3\) but the stored one \(3, 4\)"):
        error(torch.zeros(4, 3), quantize(torch.zeros(3, 4)))
