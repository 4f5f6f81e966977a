"""Kinds of fine-tuning side by side: what is learned and measured, that nothing is done twice, and what is told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
import qlora
import train.loop
from benchmarks.parity import runs, tasks
from benchmarks.parity.answers import answers, tuning_loss
from benchmarks.parity.kinds import FULL, KINDS, LORA, QLORA
from benchmarks.parity.report import NOT_LEARNED, compare
from benchmarks.parity.runs import Tuning, Work, tune
from benchmarks.parity.tasks import Task, glue_task, text_task
from models.errors import ConfigError, DataError
from tests import tiny, tiny_roberta
from train.config import read_config
from train.data import DataConfig, load_data
from train.recipe import RunConfig
from train.sweep.command import FailedCells

SMALL = {kind: KINDS[kind] for kind in (FULL, LORA, QLORA)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Three kinds, two rates, and no pictures of single runs."""
    monkeypatch.setattr(runs, "KINDS", SMALL)
    monkeypatch.setattr(tasks, "RATES", {"full": (1e-3,), "adapters": (1e-3, 3e-2)})
    monkeypatch.setattr(train.loop, "plot_runs", lambda runs, target: [])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """SST-2 in small: what is good is said of every second thing."""
    place = tmp_path_factory.mktemp("glue")
    for split, count in (("train", 24), ("dev", 12)):
        rows = [f"the {split} thing {i} is {('bad', 'good')[i % 2]}\t{i % 2}\n" for i in range(count)]
        (place / "SST-2").mkdir(exist_ok=True)
        (place / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    return place


@pytest.fixture
def console():
    from rich.console import Console

    return Console(quiet=True)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# What is learned


def test_of_glue_the_dev_set_is_the_test_and_the_train_set_is_parted(model, glue, tmp_path):
    task = glue_task("sst2", glue, tmp_path, model, 10, None)
    parts = {part: lines(task.file(part)) for part in ("train", "tune", "test")}
    assert [len(parts[part]) for part in parts] == [18, 6, 10]
    asked = "the dev thing 1 is good\nQuestion: Is this sentence positive or negative?\nAnswer:"
    assert parts["test"][1] == {"prompt": asked, "completion": " positive"}
    learned = {it["prompt"] for part in ("train", "tune") for it in parts[part]}
    assert len(learned) == 24
    assert all("train" in prompt for prompt in learned)


def test_a_roberta_learns_classes_of_the_same_texts(glue, tmp_path):
    task = glue_task("sst2", glue, tmp_path / "work", str(tiny_roberta.checkpoint(tmp_path / "roberta")), 10, None)
    assert lines(task.file("test"))[1] == {"sentence": "the dev thing 1 is good", "label": "positive"}
    assert task.words == ()


def test_examples_that_open_alike_are_in_one_part(model, tmp_path):
    path, records = tmp_path / "texts.jsonl", []
    for number in range(40):
        records.append({"prompt": f"Name colour {number // 2}.", "completion": f"It is {number}."})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = text_task("texts", path, tmp_path / "work", model, None, None)
    parts = {part: lines(task.file(part)) for part in ("train", "tune", "test")}
    assert sorted(it["completion"].strip() for each in parts.values() for it in each) == sorted(
        record["completion"] for record in records
    )
    prompts = [{it["prompt"] for it in each} for each in parts.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 20
    assert [len(each) for each in parts.values()] == [28, 4, 8]


def test_other_examples_than_a_work_directory_has_are_refused(model, glue, tmp_path):
    task = glue_task("sst2", glue, tmp_path, model, 10, None)
    written = task.file("train").stat().st_mtime_ns
    assert glue_task("sst2", glue, tmp_path, model, 10, None) == task
    assert task.file("train").stat().st_mtime_ns == written  # another process may be reading it
    with pytest.raises(ConfigError, match=r"test.jsonl holds other examples .* another --work"):
        glue_task("sst2", glue, tmp_path, model, 11, None)


def test_too_little_to_part_is_refused(model, glue, tmp_path):
    few = tmp_path / "SST-2"
    few.mkdir()
    (few / "train.tsv").write_text("sentence\tlabel\nbad\t0\ngood\t1\n")
    (few / "dev.tsv").write_text("sentence\tlabel\nbad\t0\n")
    with pytest.raises(DataError, match="has 2 examples; at least 4"):
        glue_task("sst2", few, tmp_path / "work", model, None, None)


# How it is scored


def test_a_word_is_chosen_by_the_logits_behind_the_prompt(model, glue, tmp_path):
    task = glue_task("sst2", glue, tmp_path, model, 6, None)
    loaded, tokenizer = models.load(model), models.load_tokenizer(model)
    ids = [tokenizer.encode(f"Answer: {word}")[len(tokenizer.encode("Answer:")) :] for word in task.words]
    expected = []
    for record in lines(task.file("test")):
        sums = []
        for word in ids:  # each on its own, token by token
            context, total = tokenizer.encode(record["prompt"]), 0.0
            for id in word:
                total += loaded(torch.tensor([context]))[0, -1].float().log_softmax(-1)[id].item()
                context = [*context, id]
            sums.append(total)
        expected.append(float(record["completion"] == f" {task.words[int(np.argmax(sums))]}"))
    assert answers(model, task, "cpu") == expected


def test_a_loss_is_each_example_s_own(model, tmp_path):
    data = tiny.records(tmp_path / "colours.jsonl", 20)
    task = text_task("colours", data, tmp_path / "work", model, 2, None)
    found = answers(model, task, "cpu")
    assert len(found) == 2
    loaded, tokenizer = models.load(model), models.load_tokenizer(model)
    data = load_data(DataConfig(path=str(task.file("test")), eval_size=0, **task.data), tokenizer)
    for loss, part in zip(found, data.train, strict=True):
        ids = torch.tensor([part.input_ids])
        logs = loaded(ids).float().log_softmax(-1)[0]
        own = [-logs[i - 1, label].item() for i, label in enumerate(part.labels) if label != -100]
        assert loss == pytest.approx(np.mean(own), rel=2e-2)  # bfloat16
    assert tuning_loss(model, task, "cpu") > 0


# The runs


def test_everything_is_run_once_and_told(model, glue, tmp_path, capsys, monkeypatch):
    arguments = ["bench", "parity", "--model", model, "--data", f"sst2={glue}", "--work", str(tmp_path / "work")]
    arguments += ["--seeds", "3", "--steps", "1", "--out", str(tmp_path / "parity.json"), "--json"]
    assert qlora.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "parity.json").read_text()) == result
    assert (tmp_path / "parity.png").stat().st_size > 10_000
    assert str(tmp_path) not in json.dumps(result)

    task = result["tasks"]["sst2"]
    assert [row["kind"] for row in task["rows"]] == list(SMALL)
    assert all(len(row["seeds"]) == 3 and row["mean"] == pytest.approx(np.mean(row["seeds"])) for row in task["rows"])
    assert set(task["rates"][LORA]["tried"]) == {"0.001", "0.03"}
    best = min(task["rates"][LORA]["tried"].items(), key=lambda it: np.mean(it[1]))
    assert task["rates"][LORA]["best"] == float(best[0])

    made = sorted((tmp_path / "work" / "sst2" / "runs").glob("*/config.toml"))
    assert len(made) == 2 * 5 + 3  # two seeds at every rate, the other at the best
    configs = [read_config(RunConfig, path) for path in made]
    assert all(config.seed == config.data.seed for config in configs)
    assert {config.seed for config in configs} == {1, 2, 3}
    assert {(config.adapters, config.quantize) for config in configs} == {(False, False), (True, False), (True, True)}
    assert not list((tmp_path / "work").rglob("checkpoints")) + list((tmp_path / "work").rglob("model"))

    def refuse(config):
        raise AssertionError("a run that is done was begun again")

    monkeypatch.setattr("train.sweep.cells.prepare", refuse)
    assert qlora.main(arguments) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["tasks"] == result["tasks"]


def test_a_run_that_fails_ends_the_work_with_its_reason(model, glue, tmp_path, console):
    task = glue_task("sst2", glue, tmp_path, model, None, 1)
    task.file("train").write_text('{"prompt": "", "completion": ""}\n')
    with pytest.raises(FailedCells, match=r"failed: data: .*train.jsonl"):
        tune(task, [1], Work("cpu", console))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (["sst2"], "'sst2' is no NAME=PATH"),
        (["sst2=a", "sst2=b"], "'sst2=b' comes twice"),
        (["toy-t5=a"], "'toy-t5=a' takes no path"),
    ],
)
def test_what_is_no_task_is_refused(data, said, tmp_path, capsys):
    assert qlora.main(["bench", "parity", "--work", str(tmp_path), "--data", *data]) == 2
    assert said in capsys.readouterr().err


def test_a_place_for_the_runs_is_needed(capsys):
    assert qlora.main(["bench", "parity"]) == 2
    assert "--work" in capsys.readouterr().err


def test_the_best_rate_has_the_least_mean_loss_and_an_edge_is_told():
    lucky = Tuning({1e-4: [2.0, 2.0], 1e-3: [1.5, 1.5], 1e-2: [1.0, 3.0]})
    assert lucky.best == 1e-3
    assert not lucky.at_edge
    assert Tuning({1e-4: [2.0], 1e-3: [1.0], 1e-2: [0.5]}).at_edge


# What is told


def task_of(measure) -> Task:
    return Task(name="x", model="m", directory=Path("d"), measure=measure, steps=1, batch_size=1)


def test_the_margin_is_a_tenth_of_the_gain_and_signs_follow_the_measure():
    draw = np.random.default_rng(0)
    before = draw.normal(3.0, 0.1, 50)
    lora = before - 1.0 + draw.normal(0, 0.01, (3, 50))
    scores = {FULL: lora + draw.normal(0, 0.01, (3, 50)), LORA: lora, QLORA: lora + 0.3 + draw.normal(0, 0.01, (3, 50))}
    told = compare(task_of("loss"), {kind: each.tolist() for kind, each in scores.items()}, before.tolist())
    assert told["margin"] == pytest.approx(0.1, rel=0.05)
    rows = {row["kind"]: row for row in told["rows"]}
    assert rows[FULL]["vs_lora"]["verdict"] == "equal within the margin"
    assert rows[QLORA]["vs_lora"]["verdict"] == "worse"
    assert rows[QLORA]["vs_lora"]["value"] == pytest.approx(0.3, abs=0.01)
    assert rows[QLORA]["vs_full"]["low"] < 0.3 < rows[QLORA]["vs_full"]["high"]
    assert "vs_lora" not in rows[LORA]
    assert "vs_full" not in rows[FULL]


def test_where_nothing_was_learned_nothing_is_said():
    scores = np.random.default_rng(1).integers(0, 2, (3, 3, 60)).astype(float)
    told = compare(task_of("accuracy"), dict(zip((FULL, LORA, QLORA), scores.tolist(), strict=True)), [0.5] * 60)
    assert told["margin"] is None
    assert {row["vs_lora"]["verdict"] for row in told["rows"] if "vs_lora" in row} == {NOT_LEARNED}
