"""What a RoBERTa reads of an example, and what is cut of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
from eval.labelling import shortened
from models.errors import ConfigError, DataError
from tests import tiny_roberta
from train.data import labelled
from train.data.batches import collate
from train.data.config import DataConfig
from train.data.formats import Example

TOKENIZER = models.load_tokenizer(tiny_roberta.DICTIONARY.parent)
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def tokenized(*texts, label: int | float | None = 1, max_len=None):
    example = Example(texts=texts, label=label, where="file:7")
    return labelled.tokenize(example, TOKENIZER, DataConfig(path="x", max_len=max_len))


def test_a_text_and_a_pair_stand_between_the_marks_of_pre_training():
    a, b = TOKENIZER.encode("A C D"), TOKENIZER.encode("W K")
    assert tokenized("A C D").input_ids == [BOS, *a, EOS] == TOKENIZER.encode("A C D", bos=True, eos=True)
    assert tokenized("A C D", "W K").input_ids == [BOS, *a, EOS, EOS, *b, EOS]
    assert (tokenized("A").label, tokenized("A").labels, tokenized("A").label_count) == (1, [], 1)


lengths = st.integers(0, 12)


@given(a=lengths, b=lengths, room=st.integers(2, 30))
def test_the_longest_is_cut_first_until_both_fit(a, b, room):
    parts = [list(range(a)), list(range(100, 100 + b))]
    kept = shortened(parts, room)
    expected = [len(part) for part in parts]
    while sum(expected) > room:  # as other tokenizers do, token by token
        expected[0 if expected[0] > expected[1] else 1] -= 1
    assert [len(part) for part in kept] == expected
    assert all(part[: len(k)] == k for part, k in zip(parts, kept, strict=True))


def test_what_is_cut_keeps_its_marks_and_is_told():
    found = tokenized("A C D E", "W K", max_len=8)
    assert found.input_ids == [BOS, *TOKENIZER.encode("A C"), EOS, EOS, *TOKENIZER.encode("W K"), EOS]
    assert found.cut_prompt
    assert not tokenized("A C D E", "W K", max_len=10).cut_prompt
    assert tokenized("A C D E", max_len=4).input_ids == [BOS, *TOKENIZER.encode("A C"), EOS]


def test_a_batch_has_one_label_a_text():
    classes = collate([tokenized("A", label=1), tokenized("A C", label=0)], 1)
    assert torch.equal(classes["labels"], torch.tensor([1, 0]))
    assert classes["input_ids"].tolist()[0][-1] == 1
    numbers = collate([tokenized("A", label=2.5), tokenized("A C", label=3)], 1)
    assert torch.equal(numbers["labels"], torch.tensor([2.5, 3.0]))


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(DataError, match="file:7 has 1 texts and the label None"):
        tokenized("A", label=None)
    with pytest.raises(DataError, match="file:7 has the label -100, which stands for none"):
        tokenized("A", label=-100.0)
    with pytest.raises(ConfigError, match="max_len=4 leaves no room for the texts"):
        tokenized("A", "C", max_len=4)
