"""Masked sentences: common tokens only, each hidden alone, and the same sums in any batches."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
from eval.answering import answer_all
from eval.pseudo import common, masked_model, pseudo_likelihoods
from models import ConfigError, DataError, NonFiniteError
from tests import tiny, tiny_roberta
from tests.examining import examinee
from tests.golden import GOLDEN

PAIRS = [
    ("M K V L A", "M K W L A"),
    ("M K", "M K"),
    ("A C D E F G H", "A C W W W F G H K"),
    ("W", "K"),
    ("L L L A L L", "L L A L L"),
]


@pytest.fixture(scope="module")
def who(tmp_path_factory):
    return examinee(tiny_roberta.checkpoint(tmp_path_factory.mktemp("model")), "roberta")


def asked(who):
    return [request for pair in PAIRS for request in pseudo_likelihoods(who, *pair)]


def by_hand(who, request):
    """One copy at a time through the whole model, without padding."""
    total = 0.0
    for place in request.places:
        ids = torch.tensor([request.ids])
        ids[0, place] = who.tokenizer.special_tokens["<mask>"]
        total += who.model(ids)[0, place].double().log_softmax(0)[request.ids[place]].item()
    return total


@pytest.mark.parametrize("batch_size", ["auto", 1, 3])
def test_every_common_token_is_guessed_from_all_others(who, batch_size):
    requests = asked(who)
    with torch.inference_mode():
        expected = [by_hand(who, request) for request in requests]
    assert answer_all(who, requests, batch_size) == pytest.approx(expected, abs=1e-4)
    assert len(set(requests)) == 9  # the second pair is twice the same sentence
    assert len(set(expected)) == 8  # and the fourth has nothing to guess


def test_a_model_in_another_layout_is_asked_alike(who):
    golden = models.load(GOLDEN / "roberta-mlm", dtype=torch.float32).eval()
    other = replace(who, loaded=golden, max_tokens=golden.max_tokens)
    requests = asked(who)
    with torch.inference_mode():
        expected = [by_hand(other, request) for request in requests]
    assert answer_all(other, requests) == pytest.approx(expected, abs=1e-4)


def test_the_tokens_that_differ_and_those_around_the_sentence_are_never_hidden(who):
    first, second = pseudo_likelihoods(who, "A C D E F", "A C W W E F")
    assert (first.places, second.places) == ((1, 2, 4, 5), (1, 2, 5, 6))
    assert first.ids[0] == who.tokenizer.bos_token_id
    assert first.ids[-1] == who.tokenizer.eos_token_id
    assert first.length == 7
    assert first.arguments == ("A C D E F", [1, 2, 4, 5])
    nothing, _ = pseudo_likelihoods(who, "W", "K")
    assert nothing.places == ()
    assert answer_all(who, [nothing]) == [0.0]


ids = st.lists(st.integers(4, 7), max_size=12)


@given(ids, ids)
def test_common_places_are_a_common_subsequence(first, second):
    first, second = [0, *first, 2], [0, *second, 2]
    here, there = common(first, second)
    assert [first[place] for place in here] == [second[place] for place in there]
    assert list(here) == sorted(set(here))
    assert list(there) == sorted(set(there))
    assert all(0 < place < len(first) - 1 for place in here)
    assert all(0 < place < len(second) - 1 for place in there)
    if first == second:
        assert len(here) == len(first) - 2


def test_equal_questions_are_one_and_other_places_another(who):
    first, _ = pseudo_likelihoods(who, "A C D", "A C W")
    again, _ = pseudo_likelihoods(who, "A  C D", "A C K")
    other, _ = pseudo_likelihoods(who, "A C D", "W C D")
    assert first == again
    assert first.key == again.key != other.key
    assert first.row == again.row != other.row
    assert first != other


def test_only_a_model_with_a_head_that_fills_masks_is_asked(who, tmp_path):
    labels = examinee(tiny_roberta.checkpoint(tmp_path / "labels", ("no", "yes")), "roberta")
    with pytest.raises(ConfigError, match="has one that labels texts; take the checkpoint as it was pre-trained"):
        answer_all(labels, pseudo_likelihoods(who, "A C", "A D"))
    with pytest.raises(ConfigError, match=r"need a masked language model \(RoBERTa\), not Llama"):
        masked_model(examinee(tiny.checkpoint(tmp_path / "causal")))


def test_a_model_that_gives_no_numbers_is_refused(who, monkeypatch):
    hidden = who.model.hidden
    monkeypatch.setattr(who.model, "hidden", lambda *inputs: hidden(*inputs) * torch.nan)
    with pytest.raises(NonFiniteError, match="no numbers"):
        answer_all(who, asked(who))


def test_what_cannot_be_masked_is_refused(who, tmp_path):
    with pytest.raises(DataError, match="a sentence has 42 tokens, but the model takes 32: 'A A A"):
        pseudo_likelihoods(who, "A " * 40, "A C")
    causal = examinee(tiny.checkpoint(tmp_path))
    with pytest.raises(ConfigError, match="need a vocabulary with <mask>"):
        pseudo_likelihoods(causal, "a", "b")
