"""RMSNorm in Triton: the definition's values and gradients on ragged rows of every width that has a launch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import norm, reference
from kernels.launch import Launch
from tests.judge import errs_at_most_twice, poisoned_memory

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rows(M, D, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in ((M, D), (D,), (M, D))]


def definition(x, weight, dy, eps=1e-5):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = reference.rms_norm(x, weight, eps)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def ours(x, weight, dy, eps=1e-5) -> Any:
    with poisoned_memory():
        y, rstd = norm.rms_norm(x, weight, eps)
        return y, *norm.rms_norm_grad(dy, x, weight, rstd, True)


def agrees(x, weight, dy):
    exact = definition(x.double(), weight.double(), dy.double())
    results = zip(ours(x, weight, dy), definition(x, weight, dy), exact, strict=True)
    return all(errs_at_most_twice(our, torchs, true) for our, torchs, true in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "D"), [(1, 1), (9, 100), (5, 576), (2, 1030), (2, 2500), (1, 8000), (1, 9000)])
def test_it_errs_at_most_twice_as_much_as_torch_against_float64(dtype, M, D):
    assert agrees(*rows(M, D, dtype))


@settings(max_examples=10)
@given(M=st.integers(1, 20), D=st.integers(1, 300), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_any_shape_agrees_with_the_definition(M, D, dtype, seed):
    assert agrees(*rows(M, D, dtype, seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_rounds_where_the_definition_rounds(dtype):
    x, weight, _ = rows(16, 250, dtype)
    same = norm.rms_norm(x, weight, 1e-5)[0] == reference.rms_norm(x, weight, 1e-5)
    assert same.float().mean() > 0.99  # all but those that the last digit of a sum decides


@pytest.mark.parametrize("block", [1, 2, 16])
@pytest.mark.parametrize("stripes", [1, 3])
def test_blocks_and_stripes_of_every_size_give_the_same(monkeypatch, block, stripes):
    monkeypatch.setattr(norm, "LAUNCHES", {128: Launch({"ROWS": block, "BLOCK_D": 128})})
    monkeypatch.setattr(norm, "WEIGHT_LAUNCH", Launch({"ROWS": block, "BLOCK_D": 32}))
    monkeypatch.setattr(norm, "STRIPES", stripes)
    x, weight, dy = rows(37, 77, torch.float32)
    for our, true in zip(ours(x, weight, dy), definition(x, weight, dy), strict=True):
        torch.testing.assert_close(our, true, atol=2e-5, rtol=1e-5)


def test_the_statistic_is_kept_for_each_row_and_the_weight_gets_a_gradient_only_if_asked():
    x, weight, dy = rows(6, 50, torch.bfloat16)
    y, rstd = norm.rms_norm(x.view(2, 3, 50), weight, 0.5)
    assert y.shape == (2, 3, 50)
    expected = (x.double().square().mean(-1) + 0.5).rsqrt().view(2, 3, 1)
    torch.testing.assert_close(rstd.double(), expected, atol=1e-6, rtol=1e-6)
    dx, dweight = norm.rms_norm_grad(dy.view(2, 3, 50), x.view(2, 3, 50), weight, rstd, False)
    assert dx.shape == (2, 3, 50)
    assert dweight is None


def test_no_rows_are_no_work():
    x, weight, _ = rows(0, 30, torch.float32)
    y, rstd = norm.rms_norm(x, weight, 1e-5)
    dx, dweight = norm.rms_norm_grad(y, x, weight, rstd, True)
    assert y.shape == dx.shape == (0, 30)
    assert dweight is not None
    assert torch.equal(dweight, torch.zeros(30))


def test_strided_rows_are_read_where_they_lie():
    x, weight, dy = rows(8, 40, torch.float32)
    wide = torch.randn(8, 80)
    wide[:, ::2] = x
    for our, true in zip(ours(wide[:, ::2], weight, dy), definition(x, weight, dy), strict=True):
        torch.testing.assert_close(our, true, atol=1e-5, rtol=1e-5)


def test_rows_wider_than_any_launch_are_refused_and_not_accepted():
    x, weight, _ = rows(1, norm.WIDEST + 1, torch.float32)
    assert not norm.accepts(x, weight)
    assert norm.accepts(x[:, 1:], weight[1:])
    assert not norm.accepts(x[:, 1:].double(), weight[1:])
    with pytest.raises(ValueError, match="holds rows of up to 16384 features; these have 16385"):
        norm.rms_norm(x, weight, 1e-5)
