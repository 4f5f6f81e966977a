"""What a T5 reads and what it writes of an example, and what limits cut."""

import pytest

import models
from models.errors import ConfigError
from tests import tiny_t5
from train.data import seq2seq
from train.data.batches import collate
from train.data.config import DataConfig
from train.data.formats import Example
from train.data.tokenized import IGNORED

TOKENIZER = models.load_tokenizer(tiny_t5.TOKENIZER)
END = TOKENIZER.eos_token_id
PAIR = Example(prompt="translate English to German: That is good.", response=" Das ist gut.", where="pairs:1")


def tokenized(example, **settings):
    return seq2seq.tokenize(example, TOKENIZER, DataConfig(path="x", **settings))


def turn(role, content):
    return {"role": role, "content": content}


def test_source_and_target_are_texts_of_their_own_that_end():
    found = tokenized(PAIR)
    assert found.input_ids == [*TOKENIZER.encode(PAIR.prompt or ""), END]
    assert found.labels == [*TOKENIZER.encode("Das ist gut."), END]
    assert (found.label_count, found.cut_prompt, found.cut_response) == (len(found.labels), False, False)


@pytest.mark.parametrize("length", [2, 3, 7])
def test_a_long_source_loses_its_last_words_and_keeps_its_end(length):
    found, whole = tokenized(PAIR, source_max_len=length), tokenized(PAIR)
    assert found.input_ids == [*whole.input_ids[: length - 1], END]
    assert (found.cut_prompt, found.cut_response, found.labels) == (True, False, whole.labels)


def test_a_long_target_has_no_end():
    found, whole = tokenized(PAIR, target_max_len=3), tokenized(PAIR)
    assert found.labels == whole.labels[:3]
    assert END not in found.labels
    assert (found.cut_prompt, found.cut_response) == (False, True)


def test_one_limit_stands_for_both_unless_they_have_their_own():
    found = tokenized(PAIR, max_len=4)
    assert (len(found.input_ids), len(found.labels)) == (4, 4)
    found = tokenized(PAIR, max_len=4, source_max_len=6)
    assert (len(found.input_ids), len(found.labels)) == (6, 4)
    exact = tokenized(PAIR, source_max_len=len(tokenized(PAIR).input_ids))
    assert not exact.cut_prompt


def test_of_a_conversation_the_last_answer_is_the_target():
    said = [turn("user", "Good?"), turn("assistant", "That."), turn("user", "House?"), turn("assistant", "Is.")]
    found = tokenized(Example(messages=(*said, turn("user", "Thanks"))))
    assert found.labels == TOKENIZER.encode("Is.", eos=True)
    expected = "User: Good?\nAssistant: That.\nUser: House?\nAssistant:"
    assert found.input_ids == TOKENIZER.encode(expected, eos=True)
    one = tokenized(Example(messages=tuple(said[:2])))
    assert one.input_ids == TOKENIZER.encode("Good?", eos=True)


def test_targets_are_padded_on_their_own():
    short = Example(prompt="good", response="That is good. That is good.", where="b")
    batch = collate([tokenized(PAIR), tokenized(short)], 0)
    assert batch["input_ids"].shape != batch["labels"].shape
    row = batch["labels"][0].tolist()
    assert row[: len(tokenized(PAIR).labels)] == tokenized(PAIR).labels
    assert set(row[len(tokenized(PAIR).labels) :]) <= {IGNORED}
    assert batch["attention_mask"].sum(1).tolist() == [len(tokenized(e).input_ids) for e in (PAIR, short)]


def test_what_a_t5_cannot_learn_is_refused():
    with pytest.raises(ConfigError, match="train_on_source is for causal models"):
        tokenized(PAIR, train_on_source=True)
    with pytest.raises(ConfigError, match="a:1 has a label but no text for it"):
        tokenized(Example(texts=("a",), label=1, where="a:1"))
