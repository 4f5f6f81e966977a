"""Dropout by counters and the narrow products of a LoRA branch, against the published generator and float64."""

import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import dropout as dropping
from kernels import project as products
from kernels.dropout import drop, numbers
from kernels.launch import Launch
from kernels.project import LAUNCHES, RANKS, project, project_grad
from tests.judge import poisoned_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASK = 0xFFFFFFFF


def philox(counter, key):
    """Philox4x32-10 on Python's integers, as in Salmon et al. (SC 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [q >> 32 ^ c[1] ^ k[0], q & MASK, p >> 32 ^ c[3] ^ k[1], p & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def mask_of(count, dropout, seed):
    """Which of `count` entries stay, by the definition in words: half a word of hash e // 8 for entry e."""
    key = (seed & MASK, seed >> 32 & MASK)
    words = [philox((c & MASK, c >> 32, 0, 0), key) for c in range(-(-count // 8))]
    halves = np.array(words, dtype=np.uint64)[:, :, None] >> np.array([0, 16], dtype=np.uint64) & np.uint64(0xFFFF)
    return torch.from_numpy(halves.reshape(-1)[:count].astype(np.int64)) >= round(dropout * 65536)


def dropped(x, dropout, seed):
    """drop(x) by the definition, in float64."""
    if not dropout:
        return x.double()
    return torch.where(mask_of(x.numel(), dropout, seed).view(x.shape), x.double() / (1 - dropout), 0)


@triton.jit
def numbers_kernel(out_ptr, seed, first, COUNT: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, 8 * COUNT), numbers(seed, first + tl.arange(0, COUNT).to(tl.int64)).to(tl.int32))


def drawn(seed, first):
    """The 64 numbers of eight counters from `first` on."""
    out = torch.full((64,), -1, dtype=torch.int32)
    numbers_kernel[(1,)](out, seed, first, **Launch({"COUNT": 8}).options())
    return out.tolist()


def test_the_generator_gives_the_published_numbers():
    """Random123's known answers; that of the kernel is the one with counter and key 0."""
    assert philox((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox((MASK,) * 4, (MASK,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    assert philox(pi[:4], pi[4:]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert drawn(0, 0)[:8] == [0xE8D5, 0x6627, 0xC58D, 0xE169, 0xAC4C, 0xBC57, 0xDBD8, 0x9B00]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**40 + 3, 2**63 - 1])
@pytest.mark.parametrize("first", [0, 1000, 2**32 - 4, 2**40])
def test_seed_and_counter_have_64_bits(seed, first):
    key = (seed & MASK, seed >> 32)
    words = [word for c in range(first, first + 8) for word in philox((c & MASK, c >> 32, 0, 0), key)]
    assert drawn(seed, first) == [half for word in words for half in (word & 0xFFFF, word >> 16)]


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple),
    dropout=st.sampled_from([0.1, 0.5, 1e-5, 0.999]),
    seed=st.integers(0, 2**63 - 1),
    dtype=st.sampled_from(DTYPES),
)
def test_every_entry_is_dropped_or_scaled_as_the_definition_says(shape, dropout, seed, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed % 97)).to(dtype)
    mask = mask_of(x.numel(), dropout, seed).view(shape)
    assert torch.equal(drop(x, dropout, seed), torch.where(mask, x * (1 / (1 - dropout)), 0))


@pytest.mark.parametrize("K", [8, 4])  # one counter for the row, and one for each entry
@pytest.mark.parametrize("entry", [0, 1, 5, 7])
def test_an_entry_stays_up_to_the_share_that_is_its_number_and_no_further(entry, K):
    number = drawn(3, 0)[entry]
    x = torch.ones(8 // K, K)
    for dropout, stays in ((number / 65536, True), ((number + 1) / 65536, False)):
        for result in (
            drop(x, dropout, 3),
            project(x, torch.eye(K), dropout, 3),
            project_grad(torch.eye(8 // K), x, dropout, 3),
        ):
            assert (result.view(-1)[entry] != 0) == stays


def test_several_programs_drop_without_a_gap_and_strides_do_not_matter():
    x = torch.ones(3, 2000)
    assert torch.equal(drop(x, 0.3, 5) != 0, mask_of(6000, 0.3, 5).view(3, 2000))
    assert torch.equal(drop(x.T, 0.3, 5) != 0, mask_of(6000, 0.3, 5).view(2000, 3))


def test_without_dropout_x_stays_itself():
    x = torch.randn(3, 5)
    assert drop(x, 0.0, 3) is x
    assert drop(x, 0.5, None) is x
    assert drop(torch.zeros(0, 5), 0.5, 3).shape == (0, 5)


@settings(max_examples=25)
@given(
    M=st.sampled_from([1, 7, 16, 17, 48, 70]),
    K=st.sampled_from([8, 24, 77, 200]),  # 77: eight neighbours do not share a row
    R=st.sampled_from([1, 3, 16, 33, 64, 70]),
    dtype=st.sampled_from(DTYPES),
    adapter=st.sampled_from(["float32", "same"]),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**63 - 1),
)
def test_both_products_err_at_most_twice_as_much_as_torch_against_float64(M, K, R, dtype, adapter, dropout, seed):
    generator = torch.Generator().manual_seed(seed % 89)
    x, dxa = (torch.randn(M, n, generator=generator).to(dtype) for n in (K, R))
    lora_a = torch.randn(R, K, generator=generator).to(torch.float32 if adapter == "float32" else dtype)
    exact = dropped(x, dropout, seed)
    thin = exact.to(dtype)

    ours, torchs = project(x, lora_a, dropout, seed), thin @ lora_a.to(dtype).T
    assert close(ours, torchs, exact @ lora_a.to(dtype).double().T)
    ours, torchs = project_grad(dxa, x, dropout, seed), dxa.T @ thin
    assert close(ours, torchs, dxa.double().T @ exact)


def close(ours, torchs, exact):
    assert ours.dtype == torchs.dtype
    assert ours.shape == torchs.shape
    slack = 1e-6 * exact.norm()  # float32 sums in another order
    return (ours.double() - exact).norm() <= 2 * (torchs.double() - exact).norm() + slack


def test_each_product_drops_the_same_entries_wherever_a_tile_begins():
    """Products with the identity show drop(x) itself."""
    for M, K in itertools.product((5, 70), (64, 77, 136)):
        x = torch.rand(M, K) + 0.5
        expected = dropped(x, 0.4, 9).float()
        torch.testing.assert_close(project(x, torch.eye(K), 0.4, 9), expected)
        torch.testing.assert_close(project_grad(torch.eye(M), x, 0.4, 9), expected)


def test_what_is_not_written_would_be_seen():
    """Fresh memory holds NaN here, for the sums of parts too."""
    for M, K, R in [(17, 300, 5), (130, 30, 70)]:
        x, lora_a, dxa = torch.randn(M, K), torch.randn(R, K), torch.randn(M, R)
        with poisoned_memory():
            ours = project(x, lora_a), project_grad(dxa, x)
        torch.testing.assert_close(ours, (x @ lora_a.T, dxa.T @ x), atol=1e-4, rtol=1e-5)


def test_a_gradient_may_be_kept_in_more_digits_than_it_is_multiplied_in():
    x, dxa = torch.randn(40, 24).bfloat16(), torch.randn(40, 3).bfloat16()
    ours = project_grad(dxa, x, dtype=torch.float32)
    torch.testing.assert_close(ours, (dxa.double().T @ x.double()).float())


@pytest.mark.parametrize("programs", [1, 3, 264])
def test_the_inner_axis_is_covered_once_however_it_is_cut(monkeypatch, programs):
    """One part of several tiles, several parts of several, and a part for each tile."""
    monkeypatch.setattr(products, "PROGRAMS", programs)
    x, lora_a, dxa = torch.randn(330, 10), torch.randn(5, 330), torch.randn(330, 5)
    torch.testing.assert_close(project(x.T, lora_a), x.T @ lora_a.T, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(project_grad(dxa, x), dxa.T @ x, atol=1e-4, rtol=1e-5)


def test_sums_come_out_the_same_every_time():
    x, lora_a = torch.randn(20, 512), torch.randn(16, 512)
    assert torch.equal(project(x, lora_a, 0.1, 1), project(x, lora_a, 0.1, 1))


def test_strides_do_not_matter():
    x, lora_a, dxa = torch.randn(40, 20).T, torch.randn(40, 6).T, torch.randn(6, 20).T
    torch.testing.assert_close(project(x, lora_a), x @ lora_a.T)
    torch.testing.assert_close(project_grad(dxa, x), dxa.T @ x)


def test_no_tokens_project_to_none_and_give_a_gradient_of_zeros():
    x = torch.zeros(0, 24)
    assert project(x, torch.ones(3, 24)).shape == (0, 3)
    assert torch.equal(project_grad(torch.zeros(0, 3), x), torch.zeros(3, 24))


def test_only_what_a_model_computes_in_is_taken():
    for module in (dropping, products):
        assert [module.accepts(torch.zeros(2, 2, dtype=d)) for d in (*DTYPES, torch.float64)] == [True] * 3 + [False]


def test_what_is_shipped_has_names_of_its_own_and_every_width_of_the_rank():
    names = [each.name for each in (*dropping.shipped(), *products.shipped())]
    assert len(names) == len(set(names)) == 1 + 5 * len(RANKS)
    assert set(products.candidates()) == set(LAUNCHES)
