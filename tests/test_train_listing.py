"""`qlora list`: what is listed is what there is."""

import json
from typing import Any

import pytest

import qlora
from train.config import parse
from train.data.formats import FORMATS
from train.listing import TRAINED, choices
from train.recipe import RunConfig


def listed(capsys, what) -> Any:
    assert qlora.main(["list", what, "--json"]) == 0
    return json.loads(capsys.readouterr().out)[what]


def test_every_listed_preset_and_size_can_be_trained_with(capsys):
    rows = listed(capsys, "presets")
    names = [name for row in rows for name in (row["name"], *(f"{row['name']}-{size}" for size in row["sizes"]))]
    assert {"guanaco-7b", "alpaca-65b", "glue-roberta-large", "full-16bit"} <= set(names)
    for name in names:
        needed = ["--model", "m", "--data.path", "d"]
        alone = parse(RunConfig, [*needed, "--preset", name, "--max-steps", "5", "--epochs", "None"])
        assert alone.max_steps == 5


def test_the_tasks_are_those_that_the_verbs_take(capsys):
    rows = listed(capsys, "tasks")
    assert {(row["verb"], row["name"]) for row in rows} >= {("train", "seq2seq"), ("eval", "perplexity")}
    assert [row["name"] for row in rows if row["verb"] == "train"] == list(choices(RunConfig, "task"))
    assert set(TRAINED) == set(choices(RunConfig, "task"))
    assert all(row["summary"] for row in rows)


def test_the_formats_are_those_of_the_reader(capsys):
    rows = listed(capsys, "formats")
    assert [row["name"] for row in rows] == list(FORMATS)
    assert next(row for row in rows if row["name"] == "alpaca")["keys"] == ["instruction+output"]


@pytest.mark.parametrize("what", ["presets", "tasks", "formats"])
def test_a_person_gets_a_table(what, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert qlora.main(["list", what]) == 0
    out = capsys.readouterr().out
    assert {"presets": "guanaco", "tasks": "classification", "formats": '{"instruction", "input", "output"}'}[
        what
    ] in out


def test_what_is_not_listed_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        qlora.main(["list", "models"])
    assert stop.value.code == 2
    assert "presets" in capsys.readouterr().err
