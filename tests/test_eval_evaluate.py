"""Scores of tasks and groups from what single documents gave, without a model."""

import json
import math
import warnings
from dataclasses import dataclass
from datetime import datetime

import pytest

from eval.evaluate import evaluate
from eval.examinee import Examinee
from eval.results import About, as_json, table
from eval.statistics import MEAN, Metric, mean_stderr
from eval.task import Group, Suite, Task
from models import DataError, Model, load_tokenizer
from tests import tiny


@dataclass(frozen=True)
class Echo:
    """Answers with what it holds."""

    value: float
    length: int = 1

    @property
    def arguments(self):
        return (str(self.value),)

    @property
    def key(self):
        return "echo", self.value

    @property
    def row(self):
        return self.value

    @classmethod
    def answer(cls, examinee, rows):
        return [[it.value for it in row] for row in rows]


def warned(values):
    warnings.warn("all predictions are the same", UserWarning, stacklevel=2)
    return sum(values) / len(values)


class Values(Task):
    """Documents that are scores; `half` counts the positive ones alone."""

    output_type = "multiple_choice"
    metrics = {
        "acc": MEAN,
        "half": MEAN,
        "told": Metric(warned, lambda values: None, higher_is_better=False),
    }
    settings = {}

    def __init__(self, name, values):
        self.name = self.alias = name
        self.documents = [{"value": value} for value in values]

    def requests(self, document, examinee):
        return [Echo(document["value"])]

    def score(self, document, answers):
        found = {"acc": answers[0], "told": answers[0]}
        return {**found, "half": answers[0] / 2} if answers[0] > 0 else found

    def target(self, document):
        return None


class Unloaded(Model):
    device = None  # pyrefly: ignore


@pytest.fixture(scope="module")
def examinee():
    tokenizer = load_tokenizer(tiny.TOKENIZER)
    return Examinee(tokenizer=tokenizer, architecture="llama", loaded=Unloaded())


ABOUT = About("m", {}, "cpu", 4, None, None, False, 1, None, datetime(2026, 1, 1), datetime(2026, 1, 2))


def found(examinee, tasks, groups=()):
    return evaluate([Suite(tasks, groups)], examinee, batch_size=4)


def test_a_metric_is_over_the_documents_that_have_a_part_in_it(examinee):
    a, b = Values("a", [1.0, 0.0, 3.0]), Values("b", [0.0, 5.0])
    result = found(examinee, [a, b], [Group("all", ("a", "b")), Group("macro", ("a", "b"), equal=True)])
    assert result.outcomes["a"].scores["half"].value == pytest.approx((0.5 + 1.5) / 2)
    assert result.outcomes["a"].scores["half"].stderr == pytest.approx(mean_stderr([0.5, 1.5]))
    assert result.groups["all"].scores["half"].value == pytest.approx((0.5 + 1.5 + 2.5) / 3)
    assert result.groups["macro"].scores["half"].value == pytest.approx((1.0 + 2.5) / 2)
    assert result.groups["all"].scores["half"].stderr is None  # b has one such document
    assert result.groups["all"].scores["told"].stderr is None


def test_a_group_has_the_metrics_that_all_of_its_tasks_have(examinee):
    result = found(examinee, [Values("a", [1.0]), Values("b", [0.0])], [Group("all", ("a", "b"))])
    assert set(result.groups["all"].scores) == {"acc", "told"}


def test_groups_within_groups_count_each_document_once(examinee):
    tasks = [Values("a", [1.0, 1.0]), Values("b", [0.0]), Values("c", [0.0])]
    groups = [Group("in", ("a", "b")), Group("out", ("in", "b", "c"), version=2)]
    result = found(examinee, tasks, groups)
    assert result.groups["out"].tasks == ("a", "b", "c")
    assert result.groups["out"].scores["acc"].value == pytest.approx(2 / 4)
    assert as_json(result, ABOUT)["versions"] == {"a": 1, "b": 1, "c": 1, "out": 2}
    lines = table(result).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:] if line.split("|")[1].strip()] == [
        "out",
        "- in",
        "- a",
        "- b",
        "- c",
    ]
    assert len({len(line) for line in lines}) == 1


def test_what_a_metric_warns_of_is_told(examinee):
    result = found(examinee, [Values("a", [1.0, 1.0])])
    assert result.outcomes["a"].warnings == ("all predictions are the same",)
    assert as_json(result, ABOUT)["warnings"] == {"a": ["all predictions are the same"]}


def test_results_are_json_even_where_a_number_is_not_finite(examinee):
    written = as_json(found(examinee, [Values("a", [math.inf, 1.0])]), ABOUT)
    again = json.loads(json.dumps(written, allow_nan=False))
    assert again["results"]["a"]["acc,none"] == "inf"
    assert again["results"]["a"]["told_stderr,none"] == "N/A"
    assert again["higher_is_better"]["a"] == {"acc": True, "half": True, "told": False}


def test_a_tasks_hash_tells_other_documents(examinee):
    hashes = [
        as_json(found(examinee, [Values("a", values)]), ABOUT)["task_hashes"]["a"]
        for values in ([1.0, 2.0], [1.0, 3.0], [1.0, 2.0])
    ]
    assert hashes[0] == hashes[2] != hashes[1]


def test_a_task_without_documents_is_refused(examinee):
    with pytest.raises(DataError, match="no documents"):
        found(examinee, [Values("a", [])])
