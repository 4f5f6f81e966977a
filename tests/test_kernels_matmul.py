"""x W^T on stored weights, for few and for more tokens: against float64, on ragged shapes, in parts, with a branch."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import epilogue, matmul_few, matmul_mid, product
from nf4 import QuantConfig, quantize
from tests.products import in_both, judge, normal, poisoned_memory, weight

DTYPES = [torch.bfloat16, torch.float16]
FORMS = {matmul_few: 17, matmul_mid: 33}  # and some tokens
STORED = [
    QuantConfig("nf4", 64),
    QuantConfig("nf4", 32, nested_block_size=5),
    QuantConfig("fp4", 128, double_quant=False),
    QuantConfig("int4", 256),
    QuantConfig("fp4-e2m1", 64, double_quant=False),
]


def forward(W, x, bias=None, xa=None, lora_b=None, scaling=1.0):
    """The definition, with xa (M, R) given."""
    y = torch.nn.functional.linear(x, W, bias)
    return y if xa is None or lora_b is None else y + scaling * xa @ lora_b.T


def check(form: ModuleType, M, N, K, config, dtype, R=0, bias=False, seed=0, scaling=1.0, adapter=torch.float32):
    """One product in poisoned memory against float64; what was computed is returned."""
    q, x = weight(N, K, config, seed), normal(seed + 1, M, K, dtype=dtype)
    b = normal(seed + 2, N, dtype=torch.float32) if bias else None
    xa = normal(seed + 3, M, R, dtype=dtype) if R else None
    lora_b = normal(seed + 4, N, R, dtype=adapter) if R else None
    with poisoned_memory():
        y = form.matmul(x, q, b, xa, lora_b, scaling)
    judge(y, *in_both(lambda W, *rest: forward(W, *rest, scaling=scaling), q, dtype, x, b, xa, lora_b))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", STORED, ids=lambda config: f"{config.codebook}-{config.block_size}")
@pytest.mark.parametrize("form", FORMS)
def test_it_errs_at_most_twice_as_much_as_torch_whatever_the_storage(form, config, dtype):
    check(form, FORMS[form], 48, 256, config, dtype)


@pytest.mark.parametrize(
    ("form", "M", "N", "K", "block_size"),
    [
        (matmul_few, 1, 1, 64, 64),
        (matmul_few, 16, 130, 128, 64),
        (matmul_few, 17, 40, 576, 128),  # blocks that begin in one row and end in the next
        (matmul_few, 32, 129, 96, 32),
        (matmul_mid, 33, 40, 576, 256),
        (matmul_mid, 65, 130, 128, 64),
        (matmul_mid, 40, 7, 96, 32),
    ],
)
def test_ragged_shapes(form, M, N, K, block_size):
    check(form, M, N, K, QuantConfig(block_size=block_size), torch.bfloat16)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("R", [1, 16, 70])
@pytest.mark.parametrize("form", FORMS)
def test_bias_and_branch_are_added_whatever_the_rank(form, R, adapter):
    check(form, FORMS[form], 40, 128, QuantConfig(), torch.bfloat16, R=R, bias=True, scaling=0.3, adapter=adapter)


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("form", FORMS)
def test_a_sum_in_parts_is_the_same_sum(form, parts, monkeypatch):
    arguments = (form, FORMS[form], 140, 512, QuantConfig(), torch.float16, 4, True)
    whole = check(*arguments)
    monkeypatch.setattr(product, "split", lambda tiles, rounds, *_: (parts, -(-rounds // parts)))
    split = check(*arguments)
    torch.testing.assert_close(split, whole, rtol=2e-3, atol=2e-3)
    assert torch.equal(split, check(*arguments))


def test_counters_are_back_at_zero_after_a_product(monkeypatch):
    counters = torch.zeros(8, dtype=torch.int32)
    monkeypatch.setattr(product, "split", lambda tiles, rounds, *_: (2, rounds // 2))
    monkeypatch.setattr(product, "arrivals", lambda tiles, device: counters)
    first = check(matmul_few, 3, 300, 256, QuantConfig(), torch.float16)
    assert not counters.any()
    assert torch.equal(first, check(matmul_few, 3, 300, 256, QuantConfig(), torch.float16))


@settings(max_examples=200)
@given(tiles=st.integers(1, 2000), rounds=st.integers(1, 400), processors=st.integers(1, 200))
def test_parts_cover_the_loop_and_run_all_at_once_or_are_short(tiles, rounds, processors):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epilogue, "processors", lambda device: processors)
        parts, length = epilogue.split(tiles, rounds, torch.device("cpu"))
    assert (parts - 1) * length < rounds <= parts * length
    assert parts == 1 or length >= 8
    assert parts == 1 or parts * tiles <= 2 * processors
    assert 2 * parts > min(2 * processors // tiles, rounds // 8)  # and not many fewer


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_give_no_outputs(form):
    assert form.matmul(torch.zeros(0, 64, dtype=torch.float16), weight(8, 64, QuantConfig())).shape == (0, 8)


@pytest.mark.parametrize("form", FORMS)
def test_x_need_not_be_contiguous(form):
    q, x = weight(8, 64, QuantConfig()), normal(0, 128, 3, dtype=torch.float16).T[:, ::2]
    assert torch.equal(form.matmul(x, q), form.matmul(x.contiguous(), q))


@settings(max_examples=10)
@given(
    form=st.sampled_from(list(FORMS)),
    dtype=st.sampled_from(DTYPES),
    sizes=st.tuples(st.integers(1, 48), st.integers(1, 150), st.integers(1, 4)),
    config=st.sampled_from(STORED),
    R=st.sampled_from([0, 3, 17]),
    bias=st.booleans(),
    parts=st.integers(1, 4),
)
def test_any_shape_any_storage_in_any_parts(form, dtype, sizes, config, R, bias, parts):
    M, N, groups = sizes
    M = min(M, 32 if form is matmul_few else M)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "split", lambda tiles, rounds, *_: (parts, -(-rounds // parts)))
        check(form, M, N, 64 * groups, config, dtype, R, bias, seed=M)


def test_each_form_accepts_its_tokens_in_16_bits_on_whole_words():
    q = weight(8, 64, QuantConfig())

    def x(tokens, dtype=torch.bfloat16):
        return torch.zeros(tokens, 64, dtype=dtype)

    assert [matmul_few.accepts(x(tokens), q) for tokens in (0, 1, 32, 33)] == [True, True, True, False]
    assert [matmul_mid.accepts(x(tokens), q) for tokens in (32, 33, 64, 65)] == [False, True, True, False]
    odd = quantize(torch.zeros(8, 48))
    for form, tokens in ((matmul_few, 4), (matmul_mid, 40)):
        assert form.accepts(x(tokens, torch.float16), q)
        assert not form.accepts(x(tokens, torch.float32), q)
        assert not form.accepts(x(tokens)[:, :48], odd)


@pytest.mark.parametrize(
    ("form", "kernel", "scaled"), [(matmul_few, "few_kernel", False), (matmul_mid, "mid_kernel", True)]
)
def test_every_launch_that_the_search_would_try_is_right(form, kernel, scaled):
    tiles = {tuple(launch.constants.items()): launch for row in form.candidates().values() for launch in row}
    q, x = weight(20, 128, QuantConfig()), normal(1, 5, 128, dtype=torch.bfloat16)
    expected = form.matmul(x, q)
    for launch in tiles.values():
        ours = product.launch_product(getattr(form, kernel), launch, scaled, x, q, None, None, None, 1.0)
        torch.testing.assert_close(ours, expected)


def test_a_token_may_begin_anywhere_in_a_buffer():
    q, buffer = weight(8, 64, QuantConfig()), normal(0, 129, dtype=torch.float16)
    for start in range(3):
        x = buffer[start : start + 64].view(1, 64)
        assert torch.equal(matmul_few.matmul(x, q), matmul_few.matmul(x.clone(), q))
