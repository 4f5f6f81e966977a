"""The question which label a text has: what is read of it, and answers that no batch changes."""

import json
from dataclasses import replace

import pytest
import torch

import models
from eval.answering import answer_all
from eval.cache import Cache
from eval.examinee import Examinee
from eval.labelling import label, marked
from models.errors import CheckpointError, ConfigError, NonFiniteError
from tests import tiny_roberta
from tests.test_train_labelled import tokenized

TEXTS = [("A C D",), ("W K W K W K", "A"), ("A",), ("D E F G", "W W W W W W W W")]


@pytest.fixture
def examinee(tmp_path):
    """One with a head of three labels."""
    return examined(tmp_path, ("a", "b", "c"))


def examined(folder, labels):
    path = tiny_roberta.checkpoint(folder, labels)
    model = models.load(path, dtype=torch.float32)
    return Examinee(
        tokenizer=models.load_tokenizer(path), architecture="roberta", max_tokens=model.max_tokens or 0, loaded=model
    )


@pytest.mark.parametrize("most", [None, 9, 6])
@pytest.mark.parametrize("texts", TEXTS)
def test_a_text_is_read_as_training_reads_it(examinee, texts, most):
    if most == 6 and len(texts) == 2:
        most = 7
    asked = label(examinee, texts, most)
    trained = tokenized(*texts, max_len=most)
    assert list(asked.ids) == trained.input_ids
    assert (asked.cut > 0) == trained.cut_prompt
    whole = marked(texts, examinee.tokenizer, None)[0]
    assert asked.cut == len(whole) - len(asked.ids)
    assert asked.arguments == texts
    assert (asked.length, asked.row, json.loads(json.dumps(asked.key))) == (
        len(asked.ids),
        asked.ids,
        ["label", list(asked.ids)],
    )


def test_the_models_own_limit_holds(examinee):
    asked = label(examinee, ("A C D E " * 20,), 1000)
    assert asked.length == examinee.max_tokens == 32
    assert answer_all(examinee, [asked])


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_answers_are_the_models_logits_whatever_the_batch(examinee, batch_size):
    asked = [label(examinee, texts) for texts in (*TEXTS, TEXTS[0])]
    answers = answer_all(examinee, asked, batch_size)
    for request, answer in zip(asked, answers, strict=True):
        with torch.inference_mode():
            alone = examinee.model(torch.tensor([request.ids]))[0]
        torch.testing.assert_close(torch.tensor(answer), alone, atol=1e-5, rtol=1e-5)
    assert answers[0] == answers[4]
    assert len(answers[0]) == 3


def test_answers_are_kept(examinee, tmp_path):
    examinee = replace(examinee, identity="this one")
    asked = [label(examinee, texts) for texts in TEXTS]
    first = answer_all(examinee, asked, cache=Cache(tmp_path / "answers.sqlite"))
    again = Cache(tmp_path / "answers.sqlite")
    assert answer_all(replace(examinee, loaded=None), asked, cache=again) == first
    assert again.hits == len(asked)


def test_a_model_that_gives_no_numbers_is_refused(examinee):
    with torch.no_grad():
        examinee.model.classifier.out_proj.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"gives \[nan, nan, nan\] for the text 'A C / D'; load it in float32"):
        answer_all(examinee, [label(examinee, ("A C", "D"))])


def test_what_gives_no_labels_is_refused(tmp_path):
    examinee = examined(tmp_path, ())
    with pytest.raises(CheckpointError, match="labels are given by a RoBERTa with a classification head"):
        answer_all(examinee, [label(examinee, ("A",))])
    with pytest.raises(ConfigError, match="max_len=4 leaves no room for the texts between their marks"):
        label(examinee, ("A", "C"), 4)
