"""Subsets of like size and length, and the comparison of what is learned from them, on a model of no interest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import models
import qlora
from benchmarks import answering, data_quality, subsets
from benchmarks.subsets import Pool
from models import DataError
from tests import tiny
from tests.datafiles import assistant, user, write
from train.data.example import Example


def pool(name, lengths):
    records = [{"input": f"{name} {i}", "output": "x"} for i in range(len(lengths))]
    return Pool(name, records, np.array(lengths, dtype=int), {})


lengths = st.lists(st.integers(1, 200), min_size=1, max_size=60)


@settings(max_examples=50)
@given(a=lengths, b=lengths, c=lengths, share=st.floats(0, 1), seed=st.integers(0, 9))
def test_of_every_set_as_many_of_every_length_are_drawn(a, b, c, share, seed):
    pools = [pool("a", a), pool("b", b), pool("c", c)]
    counts = [np.bincount(each.label_tokens // subsets.BIN, minlength=7) for each in pools]
    count = int(share * np.min(counts, axis=0).sum())
    found = subsets.matched(pools, count, seed)
    histograms = [np.bincount(p.label_tokens[found[p.name]] // subsets.BIN, minlength=7) for p in pools]
    assert all((each == histograms[0]).all() for each in histograms)
    assert [len(np.unique(places)) for places in found.values()] == [count] * 3
    again = subsets.matched(pools, count, seed)
    assert all((found[name] == again[name]).all() for name in found)

    rest = subsets.without(pools, found)
    assert all(set(rest[p.name]) | set(found[p.name]) == set(range(len(p.records))) for p in pools)
    left = int(
        np.min([np.bincount(p.label_tokens[rest[p.name]] // subsets.BIN, minlength=7) for p in pools], axis=0).sum()
    )
    others = subsets.matched(pools, left, seed, rest)
    assert all(not set(others[name]) & set(found[name]) for name in found)


@given(common=st.lists(st.integers(0, 30), min_size=1, max_size=8), share=st.floats(0, 1))
def test_what_is_shared_out_is_all_and_never_more_than_a_bin_holds(common, share):
    held = np.array(common)
    count = int(share * held.sum())
    found = subsets.apportioned(held, count)
    assert found.sum() == count
    assert ((found >= 0) & (found <= held)).all()


def test_too_few_answers_of_like_length_are_refused():
    with pytest.raises(
        DataError, match="3 examples of like length are wanted of each set, but only 2 answers of a and b"
    ):
        subsets.matched([pool("a", [5, 6, 100, 101]), pool("b", [1, 2, 64])], 3, 0)


def test_a_question_is_the_first_or_the_last_of_a_dialogue_where_that_alone_is_learned():
    messages = ({"role": "system", "content": "Be kind."}, user("a"), assistant("b"), user("c"), assistant("d"))
    assert subsets.exchange_of(Example(messages)) == {"input": "a", "output": "b"}
    last = subsets.exchange_of(Example(messages, last_only=True))
    assert last == {"input": "### Human: a ### Assistant: b ### Human: c ### Assistant:", "output": "d"}


def test_questions_come_once_and_answers_that_are_too_long_are_left_out(tmp_path):
    tokenizer = models.load_tokenizer(tiny.TOKENIZER)
    records = [
        {"instruction": "Name a colour.", "input": "", "output": "red"},
        {"instruction": "Name a colour.", "input": "", "output": "blue"},
        {"instruction": "Count.", "input": "", "output": "one two three " * 40},
    ]
    found = subsets.read_pool("a", write(tmp_path, records), tokenizer, 128)
    assert found.records == [{"input": "Name a colour.", "output": "red"}]
    assert found.facts["file"] == "my.jsonl"
    assert found.label_tokens[0] >= len(tokenizer.encode("red")) + 1  # and the end of the turn
    with pytest.raises(DataError, match=r"b\.jsonl \(classification\) has labels where questions with answers"):
        subsets.read_pool("b", write(tmp_path, [{"text": "good", "label": "x"}], "b.jsonl"), tokenizer, 128)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(data_quality, "SIZES", (2, 4))
    monkeypatch.setattr(data_quality, "STEPS", 2)
    monkeypatch.setattr(data_quality, "BATCH", 2)
    monkeypatch.setattr(answering, "NEW_TOKENS", 3)
    monkeypatch.setattr("train.loop.plot_runs", lambda *given: None)  # which takes longer than the steps


def bench(capsys, *arguments, code=0):
    assert qlora.main(["bench", "data-quality", "--device", "cpu", "--json", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 else err


def test_every_set_is_learned_and_measured_on_every_set(small, tmp_path, capsys, monkeypatch):
    model = tiny.checkpoint(tmp_path / "tiny")
    files = [f"red={tiny.records(tmp_path / 'red.jsonl')}"]
    chats = [
        {"messages": [user(f"What is {i} and one?"), assistant(f"It is small, namely {i + 1}.")]} for i in range(20)
    ]
    files.append(f"sums={write(tmp_path, chats, 'sums.jsonl')}")
    out, work = tmp_path / "q.json", tmp_path / "work"
    asked = ("--model", model, "--data", *files, "--seeds", 1, "--limit", 3, "--work", work, "--out", out)
    found = bench(capsys, *asked)
    assert json.loads(out.read_text()) == found
    assert str(tmp_path) not in out.read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    assert [(row["learned"], row["size"]) for row in found["matrix"]] == [
        ("untrained", 0), ("red", 2), ("sums", 2), ("red", 4), ("sums", 4)
    ]  # fmt: skip
    runs = found["runs"]
    assert list(runs) == ["untrained", "red-2-1", "sums-2-1", "red-4-1", "sums-4-1"]
    assert len({tuple(run["losses"].values()) for run in runs.values()}) == len(runs)  # each has learned something else
    part, whole, held = (
        set((work / folder).read_text().splitlines())
        for folder in ("subsets/red-2-1.jsonl", "subsets/red-4-1.jsonl", "held-out/red.jsonl")
    )
    assert part < whole
    assert not whole & held
    assert [len(part), len(whole), len(held)] == [2, 4, 3]

    # what a judge is to read
    answers = [work / "answers" / f"{name}.jsonl" for name in ("red-4-1", "sums-4-1")]
    judged = ["judge", *map(str, answers), "--questions", str(work / "questions.jsonl"), "--judge", str(model)]
    assert qlora.main([*judged, "--out", str(tmp_path / "ratings"), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 2 * 6

    monkeypatch.setattr(data_quality, "prepare", None)
    assert bench(capsys, *asked)["runs"] == runs  # nothing is learned again


def test_intervals_are_over_seeds_and_differences_are_paired(monkeypatch):
    monkeypatch.setattr(data_quality, "SIZES", (2, 4))
    generator = np.random.default_rng(0)
    runs: dict[str, Any] = {"untrained": {"losses": {"a": 3.0, "b": 5.0}}}
    for name in (f"{name}-{size}-{seed}" for name in "ab" for size in (2, 4) for seed in (1, 2)):
        runs[name] = {"losses": {test: float(generator.random()) for test in "ab"}, "label_tokens": 7}
    rows = data_quality.matrix(runs, ["a", "b"], (1, 2))
    assert rows[0]["losses"]["mean"] == {"mean": 4.0, "half": None, "n": 1}
    learned = [runs[f"b-4-{seed}"]["losses"] for seed in (1, 2)]
    assert (rows[-1]["learned"], rows[-1]["size"], rows[-1]["label_tokens"]) == ("b", 4, [7, 7])
    assert rows[-1]["losses"]["a"]["mean"] == pytest.approx(np.mean([each["a"] for each in learned]))
    assert rows[-1]["losses"]["mean"]["mean"] == pytest.approx(np.mean([list(each.values()) for each in learned]))
    changes = {(row["of"], row["less"]): row["losses"] for row in data_quality.differences(runs, ["a", "b"], (1, 2))}
    assert list(changes) == [("a, 2", "b, 2"), ("a, 4", "b, 4"), ("a, 4", "a, 2"), ("b, 4", "b, 2")]
    by_seed = [runs[f"a-4-{seed}"]["losses"]["b"] - runs[f"b-4-{seed}"]["losses"]["b"] for seed in (1, 2)]
    change = changes["a, 4", "b, 4"]["b"]
    assert change["mean"] == pytest.approx(np.mean(by_seed))
    assert change["half"] == pytest.approx(12.7062 * np.std(by_seed, ddof=1) / 2**0.5, rel=1e-4)  # t(0.975, 1)


def test_one_set_is_not_compared(capsys, tmp_path):
    told = bench(capsys, "--data", f"red={tiny.records(Path(tmp_path) / 'red.jsonl')}", code=2)
    assert "compares data sets: give two or more as NAME=PATH" in told


def test_rouge_is_of_the_answers_in_the_file(small, tmp_path, monkeypatch):
    from eval.chatbot.questions import Question
    from eval.superni.metrics import rouge_l

    model, tokenizer = models.load(tiny.checkpoint(tmp_path / "tiny")), models.load_tokenizer(tmp_path / "tiny")
    questions = [(Question("1", "Name a colour."), "red"), (Question("2", "And another."), "blue")]
    found = answering.answer(model, tokenizer, questions, tmp_path / "a.jsonl")
    texts = [json.loads(line)["generation"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert found["rouge_l"] == [rouge_l(text, [answer]) for text, (_, answer) in zip(texts, questions, strict=True)]
    assert found["words"] == [len(text.split()) for text in texts]
    results = {
        "untrained": {"rouge_l": [10.0, 20.0], "words": [2, 4]},
        "a-1": {"rouge_l": [20.0, 30.0], "words": [1, 1]},
        "a-2": {"rouge_l": [30.0, 40.0], "words": [3, 3]},
    }
    plain, learned = answering.summary(results, questions, {"a": ["a-1", "a-2"]})
    assert (plain["learned"], plain["rouge_l"]["value"], plain["above"]["value"], plain["words"]) == (
        "untrained",
        15,
        0,
        3,
    )
    assert (learned["rouge_l"]["value"], learned["above"]["value"], learned["words"]) == (30, 15, 2)
    assert learned["above"]["low"] == learned["above"]["high"] == 15  # both questions gained as much
    assert learned["rouge_l_on"] == {"generic": 30}
