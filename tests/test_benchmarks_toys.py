"""The toys: what their language is, what pretraining asks, and that they can be fine-tuned as released models are."""

import json
from random import Random

import pytest
import torch

import models
import train.loop
from benchmarks.parity import toys
from benchmarks.parity.answers import answers_before
from benchmarks.parity.kinds import FULL, UNTRAINED
from benchmarks.parity.runs import Tuning, Work, kinds_of, run_all
from benchmarks.parity.toys import ANSWERS, TOYS, Language, Size, halves, masked, pretrain, toy_task
from train.config import read_config
from train.recipe import RunConfig

SIZE = Size(width=32, layers=1, topics=2, topic_words=4, common_words=4, pretraining=2, labelled=8, tune=8, test=16)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return {name: toy_task(name, tmp_path_factory.mktemp("work"), SIZE, steps=2) for name in TOYS}


def test_a_text_is_of_its_topic_s_words_and_its_label_is_the_half_that_has_it():
    language = Language(Size(labelled_of_topic=1.0))
    assert len(set(language.words)) == len(language.words) == 8 * 30 + 20
    for text, answer in language.labelled(20, seed=3):
        (topic,) = {number for word in text.split() for number, of in enumerate(language.topics) if word in of}
        assert answer == ANSWERS[topic >= 4]
    assert language.labelled(5, seed=1) == language.labelled(5, seed=1) != language.labelled(5, seed=2)


def test_a_token_of_a_toy_is_a_word(tasks):
    text = " ".join(Language(SIZE).words)
    for task in tasks.values():
        tokenizer = models.load_tokenizer(task.model)
        ids = tokenizer.encode(text)
        assert len(set(ids)) == len(ids) == 12
        assert tokenizer.decode(ids).strip() == text
        assert tokenizer.unk_token_id not in ids


def test_roberta_learns_what_its_mask_hides_and_nothing_else(tasks):
    tokenizer = models.load_tokenizer(tasks["toy-roberta"].model)
    texts = [tokenizer.encode(" ".join(Language(SIZE).words))] * 20
    batch = masked(texts, tokenizer, Random(0))
    hidden = batch["labels"] != -100
    assert torch.equal(hidden, batch["input_ids"] == tokenizer.special_tokens["<mask>"])
    assert 0.1 < hidden.float().mean() < 0.3
    whole = torch.where(hidden, batch["labels"], batch["input_ids"])
    assert whole[:, 1:-1].tolist() == texts
    assert {(row[0], row[-1]) for row in whole.tolist()} == {(tokenizer.bos_token_id, tokenizer.eos_token_id)}


def test_t5_learns_the_second_half_from_the_first(tasks):
    tokenizer = models.load_tokenizer(tasks["toy-t5"].model)
    text = tokenizer.encode(" ".join(Language(SIZE).words))
    batch, end = halves([text], tokenizer), [tokenizer.eos_token_id]
    assert batch["input_ids"].tolist() == [text[:6] + end]
    assert batch["labels"].tolist() == [text[6:] + end]


@pytest.mark.parametrize("name", TOYS)
def test_pretraining_learns_which_words_go_together(tasks, name):
    size = Size(width=32, layers=1, topics=2, topic_words=4, common_words=1, of_topic=1.0, pretraining=30)
    model, tokenizer = models.load(tasks[name].untrained, dtype=torch.float32), models.load_tokenizer(tasks[name].model)
    found = pretrain(model, tokenizer, Language(size))
    assert found["last_loss"] < found["first_loss"] - 0.3


def test_a_toy_is_made_once(tasks, monkeypatch):
    monkeypatch.setattr(toys, "make", None)
    for name, task in tasks.items():
        assert toy_task(name, task.directory.parent, SIZE, steps=2) == task


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_fine_tuned_as_a_released_model_is(tasks, name, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(train.loop, "plot_runs", lambda runs, target: [])
    monkeypatch.setattr("benchmarks.parity.runs.KINDS", {FULL: {"adapters": False, "quantize": False}})
    task = tasks[name]
    rates = dict.fromkeys((FULL, UNTRAINED), Tuning({0.01: [0.0]}))
    scores = run_all(task, rates, (1,), Work("cpu", Console(quiet=True)))
    assert list(scores) == kinds_of(task) == [FULL, UNTRAINED]
    assert all(len(each) == 16 and set(each) <= {0.0, 1.0} for (each,) in scores.values())
    started = {read_config(RunConfig, path).model for path in (task.directory / "runs").glob("*/config.toml")}
    assert started == {task.model, task.untrained}
    before = answers_before(task, "cpu")  # and below: a run whose weights are gone is made again to be asked anew
    for kept in (task.directory / "runs" / "cells").glob("*.answers"):
        kept.unlink()
    assert run_all(task, rates, (1,), Work("cpu", Console(quiet=True))) == scores
    assert len(before) == 16
    if name == "toy-roberta":  # which has no head yet: what is most frequent
        labels = [json.loads(line)["label"] for line in task.file("test").read_text().splitlines()]
        assert sum(before) == max(map(labels.count, ANSWERS))
