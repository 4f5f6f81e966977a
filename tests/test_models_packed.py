"""Packed rows: what is computed of a text is what would be computed of it alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
import models
from models import LoraConfig, attach_lora
from models.config import LlamaConfig
from models.llama import Llama
from models.packed import Pieces, pieces_of
from nf4 import QuantConfig
from tests.test_models_roberta import small as roberta
from tests.tiny import checkpoint
from tests.tiny_t5 import t5
from train.data.batches import IGNORED, Tokenized, collate
from train.data.packing import pack

V = 37


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    model = Llama(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2, head_dim=4))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("model") / "model")


def text(size, seed=0):
    generator = torch.Generator().manual_seed(size + 100 * seed)
    ids = torch.randint(0, V, (size,), generator=generator).tolist()
    asked = size // 3 + 1
    return Tokenized(ids, [IGNORED] * asked + ids[asked:], "")


def step(model, batch, checkpointing):
    """The loss of a batch, and every gradient."""
    model.zero_grad()
    model.gradient_checkpointing = checkpointing
    model.train()
    loss = model.loss(**batch)
    loss.backward()
    model.gradient_checkpointing = False
    model.eval()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_like(got, expected, tolerance=1e-5):
    assert (got - expected).norm() <= tolerance * expected.norm()


ROWS = [[text(9), text(4), text(2), text(6)], [text(3), text(11)], [text(12, seed=1)]]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_loss_and_every_gradient_are_those_of_the_texts_unpacked(path, small, adapted, checkpointing):
    model = small
    if adapted:
        model = models.load(path, quant=QuantConfig(), dtype=torch.float32)
        attach_lora(model, LoraConfig(rank=4, dropout=0.0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    packed, plain = pack(ROWS, 0), collate([e for row in ROWS for e in row], 0)
    assert model.label_count(packed["labels"]) == model.label_count(plain["labels"])
    loss, gradients = step(model, packed, checkpointing)
    expected, expected_gradients = step(model, plain, False)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == expected_gradients.keys() != set()
    for name, gradient in expected_gradients.items():
        assert gradient.norm() > 0
        assert_like(gradients[name], gradient)


@settings(max_examples=20)
@given(
    rows=st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=5), min_size=1, max_size=3),
    left=st.integers(0, 3),
)
def test_logits_are_those_of_each_text_alone_wherever_padding_stands(small, rows, left):
    width = left + max(sum(row) for row in rows)
    ids, numbers = torch.randint(0, V, (len(rows), width)), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        numbered = [number for number, size in enumerate(row, 1) for _ in range(size)]
        numbers[place, left : left + len(numbered)] = torch.tensor(numbered)
    logits = small(ids, numbers)
    assert logits.isfinite().all()
    for place, row in enumerate(rows):
        for number in range(1, len(row) + 1):
            own = numbers[place] == number
            torch.testing.assert_close(logits[place, own], small(ids[place, own][None])[0], rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(numbers=st.lists(st.integers(0, 3), min_size=2, max_size=14))
def test_a_text_may_be_interrupted(small, numbers):
    ids, mask = torch.randint(0, V, (1, len(numbers))), torch.tensor([numbers])
    mask[0, 0] = 2
    logits = small(ids, mask)
    assert logits.isfinite().all()
    for number in set(mask[0].tolist()) - {0}:
        own = mask[0] == number
        torch.testing.assert_close(logits[0, own], small(ids[:, own])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [[1] * 4 + [2] * 5 + [3] * 3, [1, 1, 2, 2, 1, 1, 2, 2, 2, 3, 3, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_texts_change_no_bit(path, mask, dtype):
    model = models.load(path, dtype=dtype)
    numbers = torch.tensor([mask])
    ids = torch.randint(0, 100, numbers.shape)
    for number in (1, 2, 3):
        own = numbers == number
        other = torch.where(own, ids, (ids + 1) % 100)
        before, after = model(ids, numbers), model(other, numbers)
        assert torch.equal(before[own], after[own])
        assert not torch.equal(before[~own], after[~own])


def test_bfloat16_texts_are_read_as_alone(path):
    model = models.load(path, dtype=torch.bfloat16)
    packed = pack(ROWS, 0)
    exact = models.load(path, dtype=torch.float32)(packed["input_ids"], packed["attention_mask"])
    there = packed["attention_mask"] != 0
    logits = model(packed["input_ids"], packed["attention_mask"]).float()
    assert_like(logits[there], exact[there], 0.05)


def test_a_row_costs_the_attention_of_its_texts(small, monkeypatch):
    seen = []
    attention = kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda q, k, v: seen.append(q.shape[2]) or attention(q, k, v))
    packed = pack(ROWS, 0)
    small(packed["input_ids"], packed["attention_mask"])
    assert seen == [9, 4, 2, 6, 3, 11, 12] * 2


def test_pieces_are_the_texts_and_the_padding_of_each_row():
    numbers = torch.tensor([[1, 1, 2, 0], [0, 1, 3, 3]])
    assert pieces_of(numbers) == Pieces((((1, 2), (2, 1), (0, 1)), ((0, 1), (1, 1), (3, 2))))
    assert pieces_of(torch.tensor([[1, 2, 1]])) is None
    assert pieces_of(torch.tensor([[1, 0, 1]])) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_a_mask_of_zero_and_one_is_no_packed_row(small, dtype):
    ids, mask = torch.randint(0, V, (2, 6)), torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    assert torch.equal(small(ids, mask.to(dtype)), small(ids, mask))


NUMBERED = torch.tensor([[1, 1, 2, 2]])


def test_a_cache_takes_one_text_a_row(small):
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="a cache takes one text a row"):
        small(ids, NUMBERED, small.new_cache(1, 4))
    cache = small.new_cache(1, 4)
    small(ids[:, :1], cache=cache)
    with pytest.raises(ValueError, match="a cache takes one text a row"):
        small(ids[:, 1:], NUMBERED, cache)
    with pytest.raises(ValueError, match="generation takes one prompt a row"):
        models.generate(small, ids, NUMBERED, max_new_tokens=1)


def test_models_that_read_one_text_a_row_refuse_several():
    ids = torch.full((1, 4), 5)
    with pytest.raises(ValueError, match=r"up to 2\); a T5 reads one text a row, with a mask of 0 and 1"):
        t5().loss(input_ids=ids, labels=ids, attention_mask=NUMBERED)
    with pytest.raises(ValueError, match=r"up to 2\); RoBERTa reads one text a row"):
        roberta("mlm")(ids, NUMBERED)
