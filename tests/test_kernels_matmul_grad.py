"""dy W on stored weights with the LoRA branch and its dropout: against float64, and the mask bit for bit."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import matmul_grad
from nf4 import QuantConfig, quantize
from tests.products import (
    dropout_mask,
    dropout_numbers,
    in_both,
    judge,
    launch,
    normal,
    philox,
    poisoned_memory,
    weight,
)

DTYPES = [torch.bfloat16, torch.float16]
STORED = [
    QuantConfig("nf4", 64),
    QuantConfig("nf4", 32, nested_block_size=5),
    QuantConfig("fp4", 128, double_quant=False),
    QuantConfig("int4", 256),
    QuantConfig("fp4-e2m1", 64, double_quant=False),
]
SEED = 0x5EED_0123_89AB_CDEF


def check(M, N, K, config, dtype, R=0, dropout=0.0, seed=SEED, adapter=torch.float32):
    """One gradient in poisoned memory against float64; what was computed is returned."""
    q, dy = weight(N, K, config, M), normal(M + 1, M, N, dtype=dtype)
    dxa = normal(M + 2, M, R, dtype=dtype) if R else None
    lora_a = normal(M + 3, R, K, dtype=adapter) if R else None
    mask = dropout_mask((M, K), dropout, seed)

    def backward(W, dy, dxa, lora_a):
        dx = dy @ W
        return dx if dxa is None else dx + torch.where(mask, dxa @ lora_a * (1 / (1 - dropout)), 0)

    with poisoned_memory():
        dx = matmul_grad.matmul_grad(dy, q, dxa, lora_a, dropout, seed if dropout else None)
    judge(dx, *in_both(backward, q, dtype, dy, dxa, lora_a))
    return dx


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", STORED, ids=lambda config: f"{config.codebook}-{config.block_size}")
def test_it_errs_at_most_twice_as_much_as_torch_whatever_the_storage(config, dtype):
    check(5, 48, 256, config, dtype)


@pytest.mark.parametrize(
    ("M", "N", "K", "block_size"),
    [(1, 16, 64, 64), (33, 144, 64, 64), (17, 64, 576, 128), (65, 256, 64, 64), (9, 272, 96, 32)],
)
def test_ragged_shapes(M, N, K, block_size):
    check(M, N, K, QuantConfig(block_size=block_size), torch.bfloat16)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("R", [1, 16, 70])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_branch_is_added_thinned_whatever_the_rank(R, dropout, adapter):
    check(9, 48, 128, QuantConfig(), torch.bfloat16, R, dropout, adapter=adapter)


@pytest.mark.parametrize(("parts", "N"), [(2, 512), (3, 656)])  # in whole steps, and with a ragged last one
def test_a_sum_in_parts_is_the_same_sum(parts, N, monkeypatch):
    arguments = (17, N, 64, QuantConfig(), torch.float16, 4, 0.25)
    whole = check(*arguments)
    monkeypatch.setattr(matmul_grad, "split", lambda tiles, rounds, *_: (parts, -(-rounds // parts)))
    split = check(*arguments)
    torch.testing.assert_close(split, whole, rtol=2e-3, atol=2e-3)
    assert torch.equal(split, check(*arguments))


def mask_of_the_kernel(M, K, block_size, dropout, seed):
    """The mask alone, as 0 and 1 / (1 - dropout): a weight of zeros, and a branch of ones."""
    q = quantize(torch.zeros(16, K), QuantConfig(block_size=block_size, double_quant=False))
    ones = torch.ones(M, 1, dtype=torch.bfloat16), torch.ones(1, K, dtype=torch.bfloat16)
    return matmul_grad.matmul_grad(torch.zeros(M, 16, dtype=torch.bfloat16), q, *ones, dropout, seed)


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize(("dropout", "seed"), [(0.1, 0), (0.5, 1), (0.999, 2**31 + 5), (0.1, SEED), (0.3, 2**63 - 1)])
def test_the_mask_is_philoxs_bit_for_bit(dropout, seed, block_size):
    dx = mask_of_the_kernel(11, 192, block_size, dropout, seed)
    assert torch.equal(dx != 0, dropout_mask((11, 192), dropout, seed))
    assert dx.unique().tolist() == [0.0, torch.tensor(1 / (1 - dropout)).bfloat16().item()]


def test_an_entry_stays_from_the_threshold_on():
    number = dropout_numbers((3, 64), SEED)[1, 5].item()
    assert mask_of_the_kernel(3, 64, 64, number / 2**16, SEED)[1, 5] != 0
    assert mask_of_the_kernel(3, 64, 64, (number + 1) / 2**16, SEED)[1, 5] == 0


def test_philox_gives_its_published_numbers():
    def draw(counter, key):
        return [f"{word:08x}" for word in philox(np.array([counter], np.uint32), key)[0]]

    assert draw([0] * 4, 0) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert draw([2**32 - 1] * 4, 2**64 - 1) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    counter = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert draw(counter, 0x299F31D0_A4093822) == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


@triton.jit(do_not_specialize=["seed", "start"])
def draw_kernel(out_ptr, seed, start, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    d0, d1, d2, d3 = tl.randint4x(seed, start + at.to(tl.int64))
    tl.store(out_ptr + 4 * at, d0.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 4 * at + 1, d1.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 4 * at + 2, d2.to(tl.int32, bitcast=True))
    tl.store(out_ptr + 4 * at + 3, d3.to(tl.int32, bitcast=True))


@pytest.mark.parametrize("start", [0, 2**32 - 8, 2**35 + 3])
def test_a_draw_far_into_x_counts_in_64_bits(start):
    out = torch.zeros(16, 4, dtype=torch.int32)
    launch(draw_kernel, out, SEED, start, COUNT=16)
    at = np.arange(start, start + 16, dtype=np.uint64)
    zero = np.zeros_like(at)
    expected = philox(np.stack([at & np.uint64(0xFFFFFFFF), at >> np.uint64(32), zero, zero], axis=1), SEED)
    assert np.array_equal(out.numpy().view(np.uint32), expected)


def test_dropout_spares_the_base_layer():
    q, dy = weight(32, 64, QuantConfig()), normal(0, 5, 32, dtype=torch.float16)
    zeros = torch.zeros(5, 2, dtype=torch.float16), torch.zeros(2, 64, dtype=torch.float16)
    assert torch.equal(matmul_grad.matmul_grad(dy, q, *zeros, 0.9, 3), matmul_grad.matmul_grad(dy, q))


def test_no_tokens_give_no_gradient():
    dy = torch.zeros(0, 16, dtype=torch.float16)
    assert matmul_grad.matmul_grad(dy, weight(16, 64, QuantConfig())).shape == (0, 64)


def test_dy_need_not_be_contiguous():
    q, dy = weight(16, 64, QuantConfig()), normal(0, 16, 3, dtype=torch.float16).T
    assert torch.equal(matmul_grad.matmul_grad(dy, q), matmul_grad.matmul_grad(dy.contiguous(), q))


@settings(max_examples=10)
@given(
    dtype=st.sampled_from(DTYPES),
    sizes=st.tuples(st.integers(1, 48), st.integers(1, 18), st.integers(1, 3)),
    config=st.sampled_from(STORED),
    R=st.sampled_from([0, 3, 17]),
    dropout=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 2**63 - 1),
    parts=st.integers(1, 2),
)
def test_any_shape_any_storage_any_mask_in_any_parts(dtype, sizes, config, R, dropout, seed, parts):
    M, rows, groups = sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul_grad, "split", lambda tiles, rounds, *_: (parts, -(-rounds // parts)))
        check(M, 16 * rows, 64 * groups, config, dtype, R, dropout, seed)


def test_it_accepts_16_bits_on_whole_words_with_rows_of_32_bytes():
    def dy(tokens, N=32, dtype=torch.bfloat16):
        return torch.zeros(tokens, N, dtype=dtype)

    q = weight(32, 64, QuantConfig())
    assert [matmul_grad.accepts(dy(tokens), q) for tokens in (0, 1, 64, 65)] == [True, True, True, False]
    assert matmul_grad.accepts(dy(4, dtype=torch.float16), q)
    assert not matmul_grad.accepts(dy(4, dtype=torch.float32), q)
    assert not matmul_grad.accepts(dy(4, 24), weight(24, 64, QuantConfig()))
    assert not matmul_grad.accepts(dy(4, 32), quantize(torch.zeros(32, 48)))


def test_every_launch_that_the_search_would_try_is_right():
    tiles = {tuple(each.constants.items()): each for row in matmul_grad.candidates().values() for each in row}
    q, dy = weight(32, 128, QuantConfig()), normal(1, 5, 32, dtype=torch.bfloat16)
    expected = matmul_grad.matmul_grad(dy, q)
    for each in tiles.values():
        torch.testing.assert_close(matmul_grad.grad_by(each, dy, q, None, None, 0.0, None), expected)
