"""Predictions in a file scored as the reference's script does, and its two baselines that copy."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer

from eval.superni.score import main, score
from models.errors import ConfigError, DataError
from tests.datafiles import write
from tests.test_eval_superni_tasks import official, task, written

SHARED = Path(os.environ["QLORA_SHARED"]) if "QLORA_SHARED" in os.environ else None
ROWS: list[dict[str, Any]] = [  # as in predicted_examples.jsonl
    {"id": "1", "Task": "t1", "Categories": ["Word Analogy"], "Instance": {"output": ["a"]}, "prediction": "A."},
    {"id": "2", "Task": "t1", "Categories": ["Word Analogy"], "Instance": {"output": ["b"]}, "prediction": "b c"},
    {"id": "3", "Task": "t2", "Categories": ["Data to Text"], "Instance": {"output": ["x y", "z"]}, "prediction": "x"},
    {"id": "4", "Task": "t3", "Categories": ["Summarization"], "Instance": {"output": ["q"]}, "prediction": ""},
]
SCORES = {
    "rougeL": round(100 * (1 + 2 / 3 + 2 / 3 + 0) / 4, 4),
    "exact_match": 25.0,
    "instances": 4,
    "missing": 0,
    "rougeL_for_data_to_text": 66.6667,
    "exact_match_for_word_analogy": 50.0,
    "rougeL_for_summarization": 0.0,  # a category of training tasks, which has no measure of its own
    "exact_match_for_summarization": 0.0,
    "exact_match_for_t1": 50.0,
    "rougeL_for_t2": 66.6667,
    "rougeL_for_t3": 0.0,
    "exact_match_for_t3": 0.0,
}


def references(folder):
    rows = [
        {
            "id": r["id"],
            "references": r["Instance"]["output"],
            "task_id": r["Task"],
            "task_category": r["Categories"][0],
        }
        for r in ROWS
    ]
    return write(folder, rows, "references.jsonl")


def test_rows_that_bring_their_references_are_scored_alone(tmp_path):
    assert score(write(tmp_path, ROWS)) == SCORES


def test_rows_of_predictions_are_matched_with_the_leaderboards_references(tmp_path):
    known = references(tmp_path)
    bare = [{"id": row["id"], "prediction": f" {row['prediction']}\n"} for row in reversed(ROWS)]
    assert score(write(tmp_path, bare, "p.jsonl"), known) == SCORES
    some = score(write(tmp_path, bare[:-1], "p.jsonl"), known)  # without the first, which was right
    assert (some["missing"], some["exact_match"], some["instances"]) == (1, 0.0, 4)


def test_rows_of_predictions_are_matched_with_task_files(tmp_path):
    folder = written(tmp_path / "tasks", a=task(2))
    rows = [{"id": "i0", "prediction": "colour 0"}, {"id": "i1", "prediction": "none"}]
    path = write(tmp_path, rows)
    assert score(path, folder)["rougeL"] == score(path, folder / "a.json")["rougeL"] == 100.0


def test_the_baselines_copy_the_input_or_the_first_example(tmp_path):
    clone = official(tmp_path, train=task(), test=task(2))
    copied = score("copy-input", clone)
    # "Of number 0" against "colour 0": one of three words, one of two
    assert (copied["rougeL"], copied["instances"]) == (40.0, 2)
    (clone / "tasks" / "train.json").write_text(
        json.dumps({**task(2), "Positive Examples": [{"input": "x", "output": "Colour 1."}]})
    )
    assert score("copy-demo", clone, "train")["exact_match"] == 50.0


@pytest.mark.skipif(SHARED is None, reason="QLORA_SHARED does not name a folder with tasks of the data set")
def test_the_baselines_on_real_tasks_are_what_the_package_gives():
    assert SHARED is not None
    folder = SHARED / "assets" / "data" / "superni" / "official_test_tasks"
    scorer, values = RougeScorer(["rougeL"], use_stemmer=True), []
    for file in folder.glob("*.json"):
        read = json.loads(file.read_text())
        demo = read["Positive Examples"][0]["output"]
        values += [scorer.score_multi(it["output"], demo)["rougeL"].fmeasure for it in read["Instances"][:100]]
    found = score("copy-demo", folder)
    assert (found["rougeL"], found["instances"]) == (round(100 * sum(values) / len(values), 4), len(values))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"id": "1", "prediction": 5}], r"my.jsonl:1: prediction is a number"),
        ([{"id": "1", "answer": "a"}], r"my.jsonl:1: prediction is missing"),
        ([{"id": "1", "prediction": "a"}] * 2, "'1' is answered twice"),
        ([{"id": "7", "prediction": "a"}], "1 of 1 predictions are for instances that the references do not have"),
        (["{"], r"my.jsonl:1: is a text, not an object"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(tmp_path, rows, message):
    known = references(tmp_path)
    with pytest.raises(DataError, match=message):
        score(write(tmp_path, rows), known)


def test_what_cannot_be_scored_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="copy-demo needs task files"):
        score("copy-demo")
    with pytest.raises(ConfigError, match="the row of '1' has no references; give them as the second file"):
        score(write(tmp_path, [{"id": "1", "prediction": "a"}]))
    with pytest.raises(DataError, match=r"r.jsonl:1: references is an empty list"):
        score(write(tmp_path, ROWS), write(tmp_path, [{"id": "1", "references": []}], "r.jsonl"))
    with pytest.raises(DataError, match="Positive Examples is null"):
        score("copy-demo", written(tmp_path / "t", a=task(**{"Positive Examples": None})))


def test_the_command_prints_lines_or_json(tmp_path, capsys):
    path = str(write(tmp_path, ROWS))
    assert main([path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == SCORES
    assert main([path]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [f"rougeL {SCORES['rougeL']}", "exact_match 25.0"]
    assert main([str(tmp_path / "none.jsonl")]) == 3
    assert "none.jsonl cannot be read" in capsys.readouterr().err
