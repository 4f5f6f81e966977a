"""SwiGLU in Triton: the definition's values and gradients, for any number of entries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import glu, reference
from kernels.launch import Launch
from tests.judge import errs_at_most_twice, poisoned_memory

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def entries(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(3)]


def definition(gate, up, dy):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = reference.swiglu(gate, up)
    return y.detach(), *torch.autograd.grad(y, (gate, up), dy)


def ours(gate, up, dy):
    with poisoned_memory():
        return glu.swiglu(gate, up), *glu.swiglu_grad(dy, gate, up)


def agrees(gate, up, dy):
    exact = definition(gate.double(), up.double(), dy.double())
    results = zip(ours(gate, up, dy), definition(gate, up, dy), exact, strict=True)
    return all(errs_at_most_twice(our, torchs, true) for our, torchs, true in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 700), (2, 2, 513)])
def test_it_errs_at_most_twice_as_much_as_torch_against_float64(dtype, shape):
    assert agrees(*entries(shape, dtype))


@settings(max_examples=10)
@given(
    shape=st.lists(st.integers(1, 30), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape_agrees_with_the_definition(shape, dtype, seed):
    assert agrees(*entries(shape, dtype, seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_rounds_where_the_definition_rounds(dtype):
    gate, up, _ = entries((4000,), dtype)
    same = glu.swiglu(gate, up) == reference.swiglu(gate, up)
    assert same.float().mean() > 0.99  # all but those that the last digit of an exponential decides


@pytest.mark.parametrize("block", [16, 64, 4096])
def test_blocks_of_every_size_give_the_same(monkeypatch, block):
    monkeypatch.setattr(glu, "LAUNCH", Launch({"BLOCK": block}))
    assert agrees(*entries((3, 100), torch.float16))


@pytest.mark.filterwarnings("ignore:overflow")  # exp(200) is infinite, as it should be; numpy warns
def test_large_gates_give_no_nan():
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 1e4])
    up, dy = torch.ones(6), torch.ones(6)
    y, dgate, dup = ours(gate, up, dy)
    torch.testing.assert_close(y, torch.tensor([0, 0, 0, 0, 90, 1e4]))
    torch.testing.assert_close(dgate, torch.tensor([0, 0, 0, 0.5, 1, 1]))
    torch.testing.assert_close(dup, y)


def test_strided_entries_and_none_at_all():
    gate, up, dy = (t.T for t in entries((6, 5), torch.float32))
    for our, true in zip(ours(gate, up, dy), definition(gate, up, dy), strict=True):
        torch.testing.assert_close(our, true)
    assert [t.shape for t in ours(*entries((0, 7), torch.float32))] == [(0, 7)] * 3


def test_float64_is_not_accepted():
    gate, up, _ = entries((2,), torch.float64)
    assert not glu.accepts(gate, up)
    assert glu.accepts(gate.half(), up.half())
