"""Products that decode W first, and the workspace that W is decoded into."""

from concurrent.futures import ThreadPoolExecutor

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import dense, reference
from nf4 import QuantConfig, dequantize, quantize
from tests.judge import errs_at_most_twice


def stored(N=12, K=64, codebook="nf4"):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return quantize(weight, QuantConfig(codebook, block_size=32))


@settings(max_examples=30)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    codebook=st.sampled_from(["nf4", "nf3", "int8"]),
    branch=st.booleans(),
)
def test_the_product_with_its_branch_is_the_definition(sizes, dtype, codebook, branch):
    M, N, K, R = sizes
    generator = torch.Generator().manual_seed(M + N + K)
    q = stored(N, K, codebook)
    x, bias = torch.randn(M, K, generator=generator).to(dtype), torch.randn(N, generator=generator).to(dtype)
    xa = torch.randn(M, R, generator=generator).to(dtype) if branch else None
    lora_b = torch.randn(N, R, generator=generator) if branch else None
    exact = reference.matmul(x.double(), q, bias, xa, lora_b, 0.7)
    ours, torchs = (form(x, q, bias, xa, lora_b, 0.7) for form in (dense.matmul, reference.matmul))
    assert ours.dtype == dtype
    assert errs_at_most_twice(ours, torchs, exact)


def test_the_workspace_is_one_for_all_weights_and_threads_have_their_own():
    small, large = stored(N=4), stored(N=12)
    first = dense.decoded(large, torch.float32)
    assert torch.equal(first, dequantize(large, torch.float32))
    second = dense.decoded(small, torch.float32)
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, dequantize(small, torch.float32))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: dense.decoded(small, torch.float32).data_ptr()).result() != first.data_ptr()
