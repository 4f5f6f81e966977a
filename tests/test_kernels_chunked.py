"""Cross-entropy in chunks: the definition's loss and gradients, and never all logits at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import chunked, cross_entropy, reference
from tests.judge import errs_at_most_twice, poisoned_memory


def problem(L, D, V, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(L, D, generator=generator).to(dtype)
    weight = (torch.randn(V, D, generator=generator) / D**0.5).to(dtype)
    targets = torch.randint(0, V, (L,), generator=generator)
    targets[::4] = -100
    return hidden, weight, targets


def definition(hidden, weight, targets):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    losses = reference.linear_cross_entropy(hidden, weight, targets, reduction="none")
    return losses.detach(), *torch.autograd.grad(losses.sum(), (hidden, weight))


@pytest.mark.parametrize("rows", [chunked.rows_cross_entropy, cross_entropy.cross_entropy])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk_bytes", [1, 2**30])
def test_it_errs_at_most_twice_as_much_as_torch_against_float64(monkeypatch, rows, dtype, chunk_bytes):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": chunk_bytes})
    arguments = problem(37, 24, 70, dtype)
    with poisoned_memory():
        losses, dhidden, dweight = chunked.linear_cross_entropy(*arguments, -100, True, True, rows)
    assert dhidden is not None
    assert dweight is not None
    assert dweight.dtype == torch.float32  # the sum over chunks
    torchs = definition(*arguments)
    exact = definition(*(a.double() if a.is_floating_point() else a for a in arguments))
    for our, torchs_own, true in zip((losses, dhidden, dweight.to(dtype)), torchs, exact, strict=True):
        assert errs_at_most_twice(our, torchs_own, true)


@settings(max_examples=20)
@given(
    L=st.integers(0, 50),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 60)),
    asked=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_chunks_of_any_problem_give_the_definitions_losses_and_the_gradients_asked_for(L, sizes, asked, seed):
    arguments = problem(L, sizes[0], sizes[1], torch.float32, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK_BYTES", {"cpu": 1})
        patch.setattr(chunked, "ROW_BYTES", 3 * 4 * sizes[1])
        results = chunked.linear_cross_entropy(*arguments, -100, *asked)
    for our, true, wanted in zip(results, definition(*arguments), (True, *asked), strict=True):
        assert (our is not None) == wanted
        if wanted:
            torch.testing.assert_close(our, true, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("V", [1, 1000, 32000, 49152, 128256, 256000, 10**8])
def test_a_chunk_of_logits_fits_its_bytes_but_has_16_tokens_at_least(V):
    size = chunked.chunk_size(V, 2, torch.device("cpu"))
    assert size % 16 == 0
    assert size * V * 2 <= chunked.CHUNK_BYTES["cpu"] or size == 16
    assert (size + 16) * V * 2 > chunked.CHUNK_BYTES["cpu"]
    assert chunked.chunk_size(V, 2, torch.device("meta")) >= size


class Sizes(TorchDispatchMode):
    """Bytes of the tensors that operators made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("train_head", [False, True])
def test_no_tensor_is_larger_than_a_chunk_of_logits_or_the_heads_gradient(train_head):
    L, D, V = 512, 8, 49152
    hidden, weight, targets = problem(L, D, V, torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_(train_head)
    with Sizes() as ours:
        kernels.linear_cross_entropy(hidden, weight, targets).backward()
        with torch.no_grad():
            kernels.linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert ours.largest <= chunked.CHUNK_BYTES["cpu"] < L * V * 2
    with Sizes() as plain:
        reference.linear_cross_entropy(hidden, weight, targets).backward()
    assert plain.largest == L * V * 4  # what it is spared, and that the sizes are seen


def test_a_frozen_head_costs_no_product_for_its_gradient():
    hidden, weight, targets = problem(40, 6, 30, torch.float32)
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in func.name():
                products.append(func)
            return func(*args, **(kwargs or {}))

    for asked, count in (((False, False), 1), ((True, False), 2), ((True, True), 3)):
        products.clear()
        with Products():
            chunked.linear_cross_entropy(hidden, weight, targets, -100, *asked)
        assert len(products) == count
