"""Texts written in batches: the same as one by one, up to a stop text, without the prompt."""

from dataclasses import replace

import pytest
import torch

import models
from eval.answering import answer_all
from eval.examinee import Examinee
from eval.generation import before_stop, generation
from models import DataError, Sampling
from tests import tiny, tiny_t5

PROMPTS = ("It is", "Name colour 3.", "A small one, and then another", "so")


@pytest.fixture(scope="module")
def examinee(tmp_path_factory):
    path = tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")
    model = models.load(path, dtype=torch.float32).eval()
    return Examinee(tokenizer=models.load_tokenizer(path), architecture="llama", max_tokens=256, loaded=model)


def alone(examinee, prompt, count):
    """The text that generate writes, decoded up to the end-of-text token."""
    ids = examinee.prompted(prompt)
    row = models.generate(examinee.model, torch.tensor([ids]), max_new_tokens=count)[0].tolist()[len(ids) :]
    ends = [place for place, id in enumerate(row) if id in examinee.model.config.eos_token_id]
    return examinee.tokenizer.decode(row[: ends[0]] if ends else row)


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_a_batch_writes_what_each_prompt_alone_would(examinee, batch_size):
    requests = [generation(examinee, prompt, count) for prompt in PROMPTS for count in (4, 20)]
    expected = [alone(examinee, prompt, count) for prompt in PROMPTS for count in (4, 20)]
    assert answer_all(examinee, requests, batch_size) == expected
    assert len(set(expected)) > 4


def test_a_text_ends_before_the_first_mark(examinee):
    whole = alone(examinee, "It is", 30)
    mark = whole[7:9]
    found = answer_all(examinee, [generation(examinee, "It is", 30, stop=("never", mark))])[0]
    assert found == whole[: whole.index(mark)]
    assert before_stop("one two", ()) == "one two"
    assert before_stop("one two", ("w", "e ")) == "on"


def test_a_text_ends_where_the_model_ends_it(examinee, monkeypatch):
    """What fills a row that has stopped may be a token like any other, and is no part of the text."""
    model = examinee.model
    ids = examinee.prompted("It is")
    row = models.generate(model, torch.tensor([ids]), max_new_tokens=9, eos_token_id=-1)[0, len(ids) :].tolist()
    monkeypatch.setattr(model, "config", replace(model.config, eos_token_id=(row[4],), pad_token_id=row[0]))
    requests = [generation(examinee, prompt, 9) for prompt in ("It is", "Name colour 3.")]
    assert answer_all(examinee, requests)[0] == examinee.tokenizer.decode(row[: row.index(row[4])])


def test_in_a_chat_prompts_are_a_users_and_answers_begin_without_a_space(examinee):
    tokenizer = examinee.tokenizer
    chat = replace(examinee, chat=True)
    opened = models.render_chat(tokenizer, [{"role": "user", "content": "It is"}], add_generation_prompt=True)[0]
    assert generation(chat, "It is", 3).ids == tuple(opened)
    assert chat.pair("It is", " red") == (opened, tokenizer.encode("red"))
    assert generation(examinee, "It is", 3).ids == tuple(tokenizer.encode("It is"))


def test_a_written_mark_ends_the_writing(examinee, monkeypatch):
    steps = []
    forward = examinee.model.model.forward

    def counted(*arguments, **more):
        steps.append(1)
        return forward(*arguments, **more)

    monkeypatch.setattr(examinee.model.model, "forward", counted)
    mark = alone(examinee, "It is", 6)[:3]
    steps.clear()
    answer_all(examinee, [generation(examinee, "It is", 200, stop=(mark,))])
    assert len(steps) <= 10


def test_draws_do_not_depend_on_who_shares_the_batch(examinee):
    sampling = Sampling(temperature=1.0)
    requests = [generation(examinee, prompt, 8, sampling=sampling, seed=seed) for prompt in PROMPTS for seed in (1, 2)]
    together = answer_all(examinee, requests, 8)
    assert together == [answer_all(examinee, [request], 1)[0] for request in requests]
    assert together[0] != together[1]


def test_of_a_long_prompt_the_end_is_kept(examinee):
    short = replace(examinee, max_tokens=12)
    ids = examinee.prompted(PROMPTS[2] * 3)
    request = generation(short, PROMPTS[2] * 3, 5)
    assert request.ids == tuple(ids[-7:])
    assert request.cut == len(ids) - 7
    with pytest.raises(DataError, match="takes 12 at once"):
        generation(short, "It", 12)


def test_a_t5_writes_a_text_of_its_own():
    model = tiny_t5.t5(vocab_size=models.load_tokenizer(tiny_t5.TOKENIZER).vocab_size)
    examinee = Examinee(tokenizer=models.load_tokenizer(tiny_t5.TOKENIZER), architecture="t5", loaded=model)
    requests = [generation(examinee, text, 6) for text in ("a", "the house is", "of")]
    assert requests[0].ids[-1] == examinee.tokenizer.eos_token_id
    expected = []
    for request in requests:
        row = models.generate(model, torch.tensor([request.ids]), max_new_tokens=6)[0].tolist()[1:]
        expected.append(examinee.tokenizer.decode([id for id in row if id not in (0, 1)]))
    assert answer_all(examinee, requests) == expected
