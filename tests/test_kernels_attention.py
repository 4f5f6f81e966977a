"""Causal attention: the definition's values and gradients, in every layout of memory, and in the model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import cpu_attention, reference
from tests.judge import errs_at_most_twice

BF16 = torch.empty(1, 1, 1, 16, dtype=torch.bfloat16)
needs_c = pytest.mark.skipif(not cpu_attention.accepts(BF16, BF16), reason="this CPU does not multiply bfloat16")


def heads(B=2, H=4, K=2, T=7, C=16, dtype=torch.bfloat16, seed=0):
    """q, k and v as a model has them: (B, T, heads, C) in memory, seen as (B, heads, T, C)."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(B, T, h, C, generator=generator).to(dtype).transpose(1, 2) for h in (H, K, K))
    return [t.requires_grad_() for t in made]


def run(operators, q, k, v):
    """The result and the gradients of q, k and v."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    y = operators.attention(*leaves)
    dy = torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@needs_c
@settings(max_examples=30)
@given(
    B=st.integers(1, 2),
    K=st.integers(1, 3),
    group=st.integers(1, 3),
    T=st.integers(2, 110),
    C=st.sampled_from([16, 32, 48, 64, 80, 128]),
    seed=st.integers(0, 99),
)
def test_in_bfloat16_it_errs_at_most_twice_as_much_as_torch_against_float64(B, K, group, T, C, seed):
    q, k, v = heads(B, K * group, K, T, C, seed=seed)
    assert cpu_attention.accepts(q, k)
    exact = run(reference, *(t.double() for t in (q, k, v)))
    for ours, torchs, true in zip(run(kernels, q, k, v), run(reference, q, k, v), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert errs_at_most_twice(ours, torchs, true)


@needs_c
def test_scores_far_apart_and_weights_that_vanish_are_taken_as_they_are():
    q, k, v = heads(T=50)
    q, k = 60 * q.detach(), 60 * k.detach()
    exact = run(reference, *(t.double() for t in (q, k, v)))
    for ours, true in zip(run(kernels, q, k, v), exact, strict=True):
        assert ours.isfinite().all()
        assert (ours.double() - true).norm() <= 0.02 * true.norm()


@needs_c
def test_a_single_token_attends_to_itself():
    q, k, v = heads(T=1, H=2, K=1)
    y, dq, dk, dv = run(kernels, q, k, v)
    assert torch.equal(y, v.expand_as(y))
    assert not dq.any()
    assert not dk.any()
    assert dv.any()


@needs_c
@pytest.mark.parametrize("layout", ["contiguous", "odd strides", "channels apart", "offset"])
def test_every_layout_of_memory_is_read_right(layout):
    q, k, v = (t.detach() for t in heads(T=9))
    expected = kernels.attention(q, k, v)
    laid = {
        "contiguous": q.contiguous(),
        "odd strides": torch.empty(2, 4, 9, 17, dtype=q.dtype)[..., :16].copy_(q),
        "channels apart": q.transpose(2, 3).contiguous().transpose(2, 3),
        "offset": torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q),
    }[layout]
    assert torch.equal(kernels.attention(laid, k, v), expected)


@needs_c
def test_no_later_token_is_seen():
    q, k, v = (t.detach() for t in heads(T=100))
    before = kernels.attention(q, k, v)
    for t in (q, k, v):
        t[:, :, 60:] = 1e4
    assert torch.equal(kernels.attention(q, k, v)[:, :, :60], before[:, :, :60])


@needs_c
def test_what_is_kept_is_what_came_in_the_result_and_one_number_a_row():
    q, k, v = heads(T=40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.attention(q, k, v)
    assert [tuple(t.shape) for t in kept] == [
        (2, 4, 40, 16),
        (2, 2, 40, 16),
        (2, 2, 40, 16),
        (2, 4, 40, 16),
        (2, 4, 40),
    ]


def test_on_a_cpu_without_such_products_torchs_own_is_taken(monkeypatch):
    monkeypatch.setattr(cpu_attention, "library", lambda: None)
    q, k, v = heads(T=20)
    exact = run(reference, *(t.double() for t in (q, k, v)))
    for ours, torchs, true in zip(run(kernels, q, k, v), run(reference, q, k, v), exact, strict=True):
        assert errs_at_most_twice(ours, torchs, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_types_take_torchs_own(dtype):
    q, k, v = heads(dtype=dtype)
    assert not cpu_attention.accepts(q, k)
    for ours, theirs in zip(run(kernels, q, k, v), run(reference, q, k, v), strict=True):
        assert torch.equal(ours, theirs)


@needs_c
def test_torch_finds_schema_fake_and_gradient_in_order():
    q, k, v = heads(T=5)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.qlora.attention.default, (q, k, v), test_utils=checks)
    y, lse = torch.ops.qlora.attention(q, k, v)
    given = tuple(t.detach() for t in (y, q, k, v, y, lse))
    torch.library.opcheck(torch.ops.qlora.attention_grad.default, given, test_utils=checks)


@pytest.mark.parametrize("operators", [kernels, reference])
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 7, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
        ((2, 4, 7, 16), (2, 2, 6, 16), (2, 2, 6, 16)),
        ((2, 4, 7, 16), (2, 2, 7, 16), (2, 4, 7, 16)),
        ((4, 7, 16), (2, 7, 16), (2, 7, 16)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(operators, shapes):
    with pytest.raises(ValueError, match=r"q is \(B, H, T, C\), k and v are \(B, K, T, C\) and K divides H"):
        operators.attention(*(torch.zeros(shape) for shape in shapes))
