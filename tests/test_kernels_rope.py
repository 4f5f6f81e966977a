"""Rotary positions in Triton: the definition's values on views of any layout; the gradient is the way back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import layers, reference, rope
from kernels.launch import Launch
from tests.judge import errs_at_most_twice, poisoned_memory

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def heads(shape, dtype=torch.float32, tables=None):
    """x as it comes out of a projection, and cosines and sines of angles of all sizes."""
    B, H, T, C = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, H * C, generator=generator).to(dtype).view(B, T, H, C).transpose(1, 2)
    angles = 20 * torch.randn(tables or B, 1, T, C // 2, generator=generator)
    return x, angles.cos(), angles.sin()


def agrees(x, cos, sin):
    with poisoned_memory():
        y, back = rope.rotate(x, cos, sin), rope.rotate(x, cos, sin, backwards=True)
    assert y.stride() == x.stride()
    leaf = x.double().requires_grad_()
    exact = reference.rotate(leaf, cos, sin)
    (gradient,) = torch.autograd.grad(exact, leaf, x.double())
    torchs = reference.rotate(x, cos, sin), reference.rotate(x, cos, -sin)
    return errs_at_most_twice(y, torchs[0], exact) and errs_at_most_twice(back, torchs[1], gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 64), (1, 9, 2, 48), (1, 40, 2, 6), (1, 2, 2, 160), (1, 1, 1, 512)])
def test_it_errs_at_most_twice_as_much_as_torch_against_float64(dtype, shape):
    assert agrees(*heads(shape, dtype))


@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6)),
    half=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    shared=st.booleans(),
)
def test_any_shape_agrees_with_the_definition(shape, half, dtype, shared):
    assert agrees(*heads((*shape, 2 * half), dtype, tables=1 if shared else None))


@pytest.mark.parametrize("turn", [rope.rotate, layers.rotate])
def test_turning_backwards_undoes_turning(turn):
    x, cos, sin = heads((2, 3, 4, 32))
    torch.testing.assert_close(turn(turn(x, cos, sin), cos, sin, True), x)
    assert not torch.allclose(turn(x, cos, sin), x, atol=0.1)


@pytest.mark.parametrize("block", [1, 2, 8])
def test_blocks_of_every_size_give_the_same(monkeypatch, block):
    monkeypatch.setattr(rope, "LAUNCHES", {16: Launch({"HEADS": block, "BLOCK_C": 16})})
    assert agrees(*heads((2, 5, 3, 22)))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(),
        lambda x: x[:, 1:, ::2],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
    ],
)
def test_views_of_any_layout_give_the_same(view):
    x, cos, sin = heads((2, 4, 6, 10))
    x = view(x)
    cos, sin = cos[:, :, : x.shape[2]], sin[:, :, : x.shape[2]]
    torch.testing.assert_close(rope.rotate(x, cos, sin), reference.rotate(x, cos, sin))


def test_no_tokens_are_no_work():
    assert rope.rotate(*heads((2, 3, 0, 8))).shape == (2, 3, 0, 8)


def test_heads_wider_than_any_launch_are_refused_and_not_accepted():
    x, cos, sin = heads((1, 1, 1, 514))
    assert not rope.accepts(x, cos)
    assert rope.accepts(x[..., :512], cos)
    assert not rope.accepts(x[..., :512].double(), cos)
    with pytest.raises(ValueError, match="turns heads of up to 512 channels; these have 514"):
        rope.rotate(x, cos, sin)
