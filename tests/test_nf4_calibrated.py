"""Codes chosen for what a layer computes: as the definition of error feedback has them, in a format anyone decodes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nf4 import QuantConfig, dequantize, dequantize_absmax, from_state_dict, quantize, quantize_absmax, to_state_dict
from nf4.calibrated import quantize_calibrated
from nf4.codebook import levels_of
from nf4.inputs import DAMPING, Inputs, Residuals
from nf4.scales import ChosenScales
from nf4.search import search_scales, squared_error
from tests.strategies import block_sizes, codebooks

shapes = st.tuples(st.integers(1, 9), st.integers(1, 40))
scales = st.sampled_from(["absmax", "search"])
seeds = st.integers(0, 2**16)


def correlated(rows, K, seed=0):
    """Inputs that go together, as those of a trained layer do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) / K**0.5 + torch.randn(K, 1, generator=generator)
    return torch.randn(rows, K, generator=generator) @ mix.T


def inputs_of(x):
    inputs = Inputs(x.shape[-1])
    for part in x.split(7):
        inputs.add(part)
    return inputs


def weight_of(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))


@settings(max_examples=20)
@given(shape=shapes, name=codebooks, block_size=block_sizes, double_quant=st.booleans(), scale=scales, seed=seeds)
def test_feedback_is_what_its_definition_gives_for_the_scales_that_are_stored(
    shape, name, block_size, double_quant, scale, seed
):
    """One weight after the other by the inverse of what is left of H, in float64 (Frantar et al. 2023, equation 2)."""
    N, K = shape
    weight, inputs = weight_of(shape, seed), inputs_of(correlated(50, K, seed))
    q = quantize_calibrated(weight, inputs, QuantConfig(name, block_size, double_quant, 3, scale))
    stored = q.scales.double().repeat_interleave(block_size)[: N * K].view(N, K)
    found, levels = dequantize(q, torch.float32).double(), levels_of(name).double()
    damped = inputs.moment.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    rest = weight.double()
    for j in range(K):
        inverse = torch.linalg.inv(damped[j:, j:])
        distances = (rest[:, j, None] - levels * stored[:, j, None]).abs()
        chosen = (rest[:, j] - found[:, j]).abs()
        assert (chosen <= distances.amin(1) + 1e-4).all()  # halfway between two levels, float32 may take the other
        error = (rest[:, j] - found[:, j]) / inverse[0, 0]
        rest[:, j:] -= error[:, None] * inverse[0]


@settings(max_examples=20)
@given(shape=shapes, name=codebooks, block_size=block_sizes, double_quant=st.booleans(), seed=seeds)
def test_without_correlation_there_is_nothing_to_make_up_for(shape, name, block_size, double_quant, seed):
    config = QuantConfig(name, block_size, double_quant, scale="search")
    inputs = inputs_of(torch.eye(shape[1]))
    weight = weight_of(shape, seed)
    found = [quantize_calibrated(weight, inputs, config, method) for method in ("weighted", "feedback")]
    errors = [(weight - dequantize(q)).double().square().sum() for q in found]
    assert torch.allclose(*errors, rtol=1e-5, atol=1e-9)
    assert torch.allclose(found[0].scales, found[1].scales)


def test_an_error_that_none_makes_up_for_counts_by_its_damped_input():
    config, weight = QuantConfig(block_size=32, double_quant=False, scale="search"), weight_of((64, 64))
    inputs = inputs_of(torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(0)).pow(3)))
    importance = (inputs.importance + DAMPING * inputs.importance.mean()).repeat(64)
    expected = search_scales(weight.flatten(), weight.view(-1, 32).abs().amax(1), config, importance)
    found = quantize_calibrated(weight, inputs, config).scales
    assert (found - expected).abs().gt(1e-3).sum() <= 2  # of 128: two candidates may be as good as each other


@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(block_size=32), QuantConfig("int4", 64, False)])
def test_each_way_loses_less_of_the_outputs_than_the_one_before(config):
    x = correlated(2000, 256)
    x[:, ::7] *= 8  # some inputs are large
    inputs, weight = inputs_of(x), weight_of((96, 256))
    searched = replace(config, scale="search")
    stored = [quantize(weight, config), quantize(weight, searched)]
    stored += [quantize_calibrated(weight, inputs, searched, method) for method in ("weighted", "feedback")]
    plain, search, weighted, feedback = (float(((dequantize(q) - weight) @ x.T).square().mean()) for q in stored)
    assert feedback < 0.7 * weighted < 0.8 * plain
    assert weighted < search
    assert all(q.nbytes == stored[0].nbytes for q in stored)


@settings(max_examples=20)
@given(shape=shapes, name=st.sampled_from(["nf4", "fp4"]), double_quant=st.booleans(), seed=seeds)
def test_any_reader_decodes_it(shape, name, double_quant, seed):
    weight = weight_of(shape, seed)
    q = quantize_calibrated(
        weight, inputs_of(correlated(50, shape[1])), QuantConfig(name, 64, double_quant, scale="search")
    )
    theirs = to_state_dict(quantize(weight, QuantConfig(name, 64, double_quant)), "w")
    ours = to_state_dict(q, "w")
    state = next(key for key in ours if "quant_state" in key)
    assert {k: (v.dtype, v.shape) for k, v in ours.items() if k != state} == {
        k: (v.dtype, v.shape) for k, v in theirs.items() if k != state
    }
    assert torch.equal(dequantize(from_state_dict(ours, "w")), dequantize(q))


@given(name=codebooks, block_size=block_sizes, seed=seeds)
def test_no_block_has_a_larger_weighted_error_than_with_absmax(name, block_size, seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(6, block_size, generator=generator)
    importance = torch.rand(6, block_size, generator=generator).pow(4)
    absmax = blocks.abs().amax(1)
    scales = search_scales(blocks.view(-1), absmax, QuantConfig(name, block_size, False), importance.view(-1))
    before, after = (squared_error(blocks, s, name, importance) for s in (absmax, scales))
    assert (after <= before).all()


def test_what_counts_nothing_has_no_say_in_a_scale():
    # All weights but one are exactly levels of the scale 0.5, and that one, though the largest, is never used.
    levels = levels_of("nf4")
    blocks = (levels[torch.randint(16, (8, 64), generator=torch.Generator().manual_seed(0))] / 2).contiguous()
    blocks[:, 1] = 0.5
    blocks[:, 0], importance = 0.9, torch.ones(8, 64)
    importance[:, 0] = 0
    scales = search_scales(blocks.view(-1), torch.full((8,), 0.9), QuantConfig(), importance.view(-1))
    assert torch.allclose(scales, torch.tensor(0.5))


@given(seed=seeds, blocks=st.integers(1, 30), nested_block_size=st.sampled_from([1, 4, 256]))
def test_a_scale_becomes_the_nearest_that_the_second_level_can_say(seed, blocks, nested_block_size):
    generator = torch.Generator().manual_seed(seed)
    guess, wished = torch.randn(2, blocks, generator=generator)
    scales = ChosenScales(guess, QuantConfig(nested_block_size=nested_block_size))
    some = torch.randperm(blocks, generator=generator)[: blocks // 2 + 1]
    put = scales.put(some, wished[some])
    assert scales.nested is not None
    _, nested_absmax, offset = scales.nested
    assert torch.equal(dequantize_absmax(*scales.nested, nested_block_size), scales.decoded)
    assert torch.equal(scales.decoded[some], put)
    every = torch.arange(256, dtype=torch.uint8)
    for block, value in zip(some.tolist(), put, strict=True):
        sayable = dequantize_absmax(every, nested_absmax[block // nested_block_size].expand(256), offset, 1)
        assert (value - wished[block]).abs() <= (sayable - wished[block]).abs().min() * (1 + 1e-5) + 1e-7
    untouched = torch.ones(blocks, dtype=torch.bool).index_fill(0, some, False)
    first = dequantize_absmax(*quantize_absmax(guess, nested_block_size), nested_block_size)
    assert torch.equal(scales.decoded[untouched], first[untouched])


def test_moments_are_means_of_products():
    x = correlated(700, 300).view(7, 100, 300)
    inputs, weight = inputs_of(x.view(-1, 300)), weight_of((5, 300))
    rows = x.view(-1, 300).double()
    assert torch.allclose(inputs.moment.double(), rows.T @ rows / 700, rtol=1e-4, atol=1e-4)
    mean_square = float((rows @ weight.double().T).square().sum(1).mean())
    assert inputs.mean_square(weight) == pytest.approx(mean_square, rel=1e-4)
    unit = inputs.factor.double()
    damped = inputs.moment.double() + DAMPING * inputs.importance.double().mean() * torch.eye(300)
    assert torch.allclose(unit @ damped @ unit.T, torch.eye(300, dtype=torch.float64), atol=1e-3)
    assert torch.equal(unit, unit.triu())


def test_a_weight_is_fitted_to_other_outputs_by_damped_least_squares():
    generator = torch.Generator().manual_seed(5)
    x, weight = correlated(200, 12), weight_of((5, 12))
    y = x @ weight_of((5, 12), 3).T + torch.randn(200, 5, generator=generator)
    inputs, residuals = inputs_of(x), Residuals(5, 12)
    for part in (slice(0, 60), slice(60, 200)):
        residuals.add(y[part] - x[part] @ weight.T, x[part])
    damping = DAMPING * float(inputs.importance.mean()) * 200
    rows, wanted = (torch.cat([t, s * damping**0.5]) for t, s in ((x, torch.eye(12)), (y, weight.T)))
    expected = torch.linalg.lstsq(rows.double(), wanted.double()).solution.T
    fitted = residuals.fitted(weight, inputs)
    assert torch.allclose(fitted.double(), expected, atol=1e-4)
    left = float((y - x @ fitted.T).square().sum(1).mean())
    assert residuals.mean_square(fitted - weight, inputs) == pytest.approx(left, rel=1e-4)


def test_codes_are_chosen_for_the_outputs_that_are_wanted():
    x, weight = correlated(2000, 64), weight_of((16, 64))
    damaged = 0.9 * x  # as if the layers before had shrunk everything
    inputs, residuals = inputs_of(damaged), Residuals(16, 64)
    residuals.add((x - damaged) @ weight.T, damaged)
    losses = []
    for aim in (None, residuals):
        q = quantize_calibrated(weight, inputs, QuantConfig(scale="search"), residuals=aim)
        losses.append(float((x @ weight.T - damaged @ dequantize(q).T).square().mean()))
    assert losses[1] < 0.3 * losses[0]


def test_a_layer_without_input_is_quantized_for_its_weights():
    weight = weight_of((4, 64))
    q = quantize_calibrated(weight, inputs_of(torch.zeros(10, 64)))
    assert (weight - dequantize(q)).norm() < 0.12 * weight.norm()


@pytest.mark.parametrize(
    ("weight", "x", "method", "message"),
    [
        (torch.ones(4, 8), torch.ones(5, 9), "feedback", "8 inputs, but the second moments of 9"),
        (torch.ones(4, 8).double(), torch.ones(5, 8), "feedback", "float32, float16 or bfloat16"),
        (torch.full((4, 8), float("nan")), torch.ones(5, 8), "feedback", r"layer is nan at index \(0, 0\)"),
        (torch.ones(4, 8), torch.full((5, 8), float("inf")), "weighted", "inputs are not finite"),
        (torch.ones(4, 8), torch.ones(0, 8), "feedback", "no inputs were added"),
    ],
)
def test_what_cannot_be_quantized_is_refused(weight, x, method, message):
    with pytest.raises(ValueError, match=message):
        quantize_calibrated(weight, inputs_of(x), QuantConfig(), method, name="layer")
