"""Cross-entropy of rows of logits in Triton, and in plain torch: loss and, in place, its gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import chunked, cross_entropy
from kernels.launch import Launch
from tests.judge import errs_at_most_twice, poisoned_memory

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = [cross_entropy.cross_entropy, chunked.rows_cross_entropy]


def rows(L, V, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(L, V, generator=generator)).to(dtype)
    targets = torch.randint(0, V, (L,), generator=generator)
    targets[1::3] = -100
    return logits, targets


def definition(logits, targets, dtype):
    """Losses and the gradient of their sum; like torch, with the softmax in `dtype` and the gradient in the logits'."""
    leaf = logits.detach().requires_grad_()
    losses = F.cross_entropy(leaf.to(dtype), targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


def agrees(form, logits, targets):
    exact = definition(logits.double(), targets, torch.float64)
    torchs = definition(logits, targets, torch.float32)
    with poisoned_memory():
        written, read = logits.clone(), logits.clone()
        losses = form(written, targets, -100, True)
        assert torch.equal(form(read, targets, -100, False), losses)
    assert torch.equal(read, logits)  # without gradient the logits stay
    return errs_at_most_twice(losses, torchs[0], exact[0]) and errs_at_most_twice(written, torchs[1], exact[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("L", "V"), [(1, 1), (5, 300), (4, 2048), (4, 2049), (2, 20000)])
def test_it_errs_at_most_twice_as_much_as_torch_against_float64(form, dtype, L, V):
    assert agrees(form, *rows(L, V, dtype))


@settings(max_examples=10)
@given(L=st.integers(1, 9), V=st.integers(1, 500), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@pytest.mark.parametrize("form", FORMS)
def test_any_shape_agrees_with_the_definition(form, L, V, dtype, seed):
    assert agrees(form, *rows(L, V, dtype, seed))


@pytest.mark.parametrize("block", [16, 64, 512])
def test_pieces_of_every_size_give_the_same(monkeypatch, block):
    monkeypatch.setattr(cross_entropy, "LAUNCHES", {"small": Launch({"BLOCK_V": block})})
    assert agrees(cross_entropy.cross_entropy, *rows(4, 333, torch.float32))


@pytest.mark.parametrize("form", FORMS)
def test_excluded_words_and_huge_logits_give_no_nan(monkeypatch, form):
    monkeypatch.setattr(cross_entropy, "LAUNCHES", {"small": Launch({"BLOCK_V": 16})})
    logits = torch.full((3, 40), -float("inf"))
    logits[:, 20:] = torch.linspace(-1e4, 1e4, 20)
    targets = torch.tensor([39, 20, 30])
    expected = definition(logits, targets, torch.float32)
    torch.testing.assert_close(form(logits, targets, -100, True), expected[0])
    torch.testing.assert_close(logits, expected[1])


@pytest.mark.parametrize("form", FORMS)
def test_another_index_may_stand_for_not_scored(form):
    logits, targets = rows(6, 30, torch.float32)
    targets = torch.tensor([3, 7, 3, 0, 3, 29])
    expected = F.cross_entropy(logits, targets, ignore_index=3, reduction="none")
    losses = form(logits, targets, 3, True)
    torch.testing.assert_close(losses, expected)
    assert not logits[targets == 3].any()
    assert logits[targets != 3].any(dim=1).all()


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_larger_buffer_are_written_and_nothing_else(form):
    logits, targets = rows(4, 50, torch.float32)
    buffer = torch.full((4, 60), 7.0)
    buffer[:, :50] = logits
    form(buffer[:, :50], targets, -100, True)
    form(logits, targets, -100, True)
    assert torch.equal(buffer[:, :50], logits)
    assert (buffer[:, 50:] == 7).all()


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_are_no_work(form):
    assert form(*rows(0, 9, torch.float32), -100, True).shape == (0,)


def test_columns_apart_are_refused_since_nothing_could_be_written_in_place():
    logits, targets = rows(5, 5, torch.float32)
    with pytest.raises(ValueError, match=r"each row lies side by side, not \(1, 5\) apart"):
        cross_entropy.cross_entropy(logits.T, targets, -100, True)


def test_float64_is_not_accepted():
    logits, _ = rows(2, 2, torch.float64)
    assert not cross_entropy.accepts(logits, logits)
    assert cross_entropy.accepts(logits.half(), logits.half())
