"""A LoRA branch written before the dense product that is added to it: against float64, the mask bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import expand as expanding
from kernels import reference
from kernels.expand import RANKS, expand
from nf4 import QuantConfig, quantize
from tests.judge import errs_at_most_twice, poisoned_memory
from tests.products import dropout_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def definition(inner, outer, scaling, bias, dropout, seed):
    product = scaling * (inner @ outer.to(inner.dtype))
    if dropout:
        product = torch.where(dropout_mask(product.shape, dropout, seed), product * (1 / (1 - dropout)), 0)
    return product if bias is None else product + bias.to(inner.dtype)


@settings(max_examples=40)
@given(
    M=st.sampled_from([1, 7, 64, 70]),
    C=st.sampled_from([8, 77, 136]),  # 77: eight neighbours do not share a row
    R=st.sampled_from([1, 3, 16, 33, 70]),
    dtype=st.sampled_from(DTYPES),
    adapter=st.sampled_from(["float32", "same"]),
    turned=st.booleans(),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**63 - 1),
)
def test_it_errs_at_most_twice_as_much_as_torch(M, C, R, dtype, adapter, turned, bias, dropout, seed):
    generator = torch.Generator().manual_seed(seed % 97)
    inner, outer = torch.randn(M, R, generator=generator).to(dtype), torch.randn(R, C, generator=generator)
    outer = outer if adapter == "float32" else outer.to(dtype)
    outer = outer.T.contiguous().T if turned else outer
    offset = torch.randn(C, generator=generator) if bias else None
    with poisoned_memory():
        ours = expand(inner, outer, 0.7, offset, dropout, seed if dropout else None)
    offset = None if offset is None else offset.to(dtype)
    rounded = (inner.double(), outer.to(dtype).double(), 0.7, None if offset is None else offset.double())
    exact = definition(*rounded, dropout, seed)
    assert errs_at_most_twice(ours, definition(inner, outer, 0.7, offset, dropout, seed), exact)
    if dropout and not bias:
        assert torch.equal(ours == 0, exact == 0)


def test_nothing_is_expanded_to_nothing():
    assert expand(torch.zeros(0, 3), torch.zeros(3, 5)).shape == (0, 5)


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_products_with_it_are_the_definitions(dtype, branch):
    M, N, K, R = 9, 40, 96, 5
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    q = quantize(torch.randn(N, K, generator=generator), QuantConfig(block_size=32))
    x, dy, bias, a, b = normal(M, K), normal(M, N), normal(N), torch.randn(R, K), torch.randn(N, R)
    forward = (bias, normal(M, R), b, 0.5) if branch else (bias,)
    backward = (normal(M, R), a, 0.3, 11) if branch else ()
    for name, first, rest in (("matmul", x, forward), ("matmul_grad", dy, backward)):
        ours, torchs = (getattr(form, name)(first, q, *rest) for form in (expanding, reference))
        doubles = [t.to(dtype).double() if isinstance(t, torch.Tensor) else t for t in rest]
        assert errs_at_most_twice(ours, torchs, getattr(reference, name)(first.double(), q, *doubles))


def test_only_what_a_model_computes_in_is_taken():
    q = quantize(torch.zeros(4, 8), QuantConfig(block_size=32))
    taken = [expanding.accepts(torch.zeros(2, 8, dtype=dtype), q) for dtype in (*DTYPES, torch.float64)]
    assert taken == [True, True, True, False]


def test_what_is_shipped_has_names_of_its_own_and_every_width_of_the_rank():
    names = [each.name for each in expanding.shipped()]
    assert len(names) == len(set(names)) == 2 * len(RANKS)
