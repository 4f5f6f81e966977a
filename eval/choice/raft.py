"""RAFT: texts of real work, classified after a few labelled examples.

The data is a task's folder with train.csv (50 labelled rows) and test_unlabeled.csv, or a folder of such folders. A
prompt is worded as in the benchmark's own baseline:

    Possible labels:
    1. not overruling
    2. overruling

    Sentence: this is not allowable.
    Label: not overruling

    Sentence: we disapprove this dicta.
    Label:

The fields are the table's columns in their order, without ID and Label; empty ones are left out. The baseline begins
with a text of instructions that each task has; here that is the "description" of a task.json beside the tables, if it
has one. The labels are those of its "label_columns", else those that occur in train.csv: a task of which some labels
do not (Banking77) needs the file.

The answer is the label with the largest log-probability in sum. Examples (20 unless told) are drawn for every row:
one of each label that there is room for, then any, in this order; the first are dropped again where a prompt would be
longer than what the model takes.

- `--split train`, the default: every labelled row is classified with examples from the other 49 (leave-one-out).
  Accuracy, and macro F1, which is RAFT's metric. A group of tasks is their plain mean, as on its leaderboard.
- `--split test`: nothing is known to be right, so there is no score; raft/TASK/predictions.csv is what can be
  submitted, with columns ID and Label.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from eval.choice.macro_f1 import MACRO_F1
from eval.choice.reading import documents, place, text, texts
from eval.choice.task import best, few
from eval.examinee import Examinee
from eval.likelihood import likelihood
from eval.request import Request
from eval.statistics import MEAN, Metric
from eval.task import Document, Family, Group, Spec, Suite, Task
from models import DataError
from models.files import write_whole

EXAMPLES = 20  # the baseline's default
BETWEEN = "\n\n"
TRAIN, TEST, ABOUT = "train.csv", "test_unlabeled.csv", "task.json"


class Raft(Task):
    """One task: rows, of which the labelled ones serve as examples too."""

    output_type = "multiple_choice"
    version = 1

    def __init__(self, name: str, folder: Path, split: str, num_fewshot: int, seed: int) -> None:
        self.name = self.alias = f"raft_{name}"
        self.folder = name
        self.seed, self.split = seed, split
        self.train = documents(folder / TRAIN, labelled)
        self.labels, instructions = about(folder, self.train)
        listed = "\n".join(f"{number}. {label}" for number, label in enumerate(self.labels, 1))
        self.opening = "\n".join(filter(None, [instructions, "Possible labels:", listed])) + BETWEEN
        self.documents = self.train if split == "train" else documents(folder / TEST, unlabelled)
        self.num_fewshot = min(num_fewshot, len(self.train) - (split == "train"))
        self.metrics: Mapping[str, Metric] = {"acc": MEAN, "f1": MACRO_F1} if split == "train" else {}
        self.settings = {"data": str(folder), "split": split, "instructions": instructions}

    def requests(self, document: Document, examinee: Examinee) -> list[Request]:
        prompt = self.fitting(document, examinee)
        return [likelihood(examinee, prompt, f" {label}") for label in self.labels]

    def fitting(self, document: Document, examinee: Examinee) -> str:
        """The prompt, with as many examples as there is room for."""
        shown = [f"{fields(it)}\nLabel: {it['label']}{BETWEEN}" for it in self.examples(document)]
        longest = max(self.labels, key=lambda label: len(examinee.tokenizer.encode(f" {label}")))
        while True:
            prompt = f"{self.opening}{''.join(shown)}{fields(document)}\nLabel:"
            if not shown or not likelihood(examinee, prompt, f" {longest}").cut:
                return prompt
            del shown[0]

    def examples(self, document: Document) -> list[Document]:
        """Rows to learn from: one of each label, then any; never the row itself."""
        random = Random(f"{self.seed} {document['id']}")
        others = [it for it in self.train if self.split == "test" or it["id"] != document["id"]]
        random.shuffle(others)
        leading = {it["label"]: it["id"] for it in reversed(others)}
        others.sort(key=lambda it: leading[it["label"]] != it["id"])  # the order is kept otherwise
        return others[: self.num_fewshot]

    def score(self, document: Document, answers: Sequence[Any]) -> dict[str, Any]:
        if self.split == "test":
            return {}
        label = self.answer(answers)
        return {"acc": float(label == document["label"]), "f1": [document["label"], label]}

    def answer(self, answers: Sequence[Any]) -> str:
        """The label that was found most probable."""
        return self.labels[best([answer[0] for answer in answers])]

    def target(self, document: Document) -> str | None:
        return document.get("label")

    def write(self, directory: Path, documents: Sequence[Document], answers: Sequence[Sequence[Any]]) -> list[Path]:
        """The file of predictions that RAFT takes, for the test split."""
        if self.split != "test":
            return []
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["ID", "Label"])
        writer.writerows([it["id"], self.answer(found)] for it, found in zip(documents, answers, strict=True))
        path = directory / "raft" / self.folder / "predictions.csv"
        write_whole(path, table.getvalue())
        return [path]


def labelled(record: Document) -> Document:
    """A row of train.csv."""
    label = text(record, "Label")
    if not label.strip() or label == "Unlabeled":
        raise ValueError(f"has no label ({label!r} came)")
    return {**unlabelled(record), "label": label}


def unlabelled(record: Document) -> Document:
    """A row of test_unlabeled.csv, whose Label, if there is one, says nothing."""
    found = {key: value for key, value in record.items() if key not in ("ID", "Label")}
    if not any(value.strip() for value in found.values()):
        raise ValueError("all of its fields are empty")
    return {"id": text(record, "ID"), "fields": found}


def fields(document: Document) -> str:
    """A row's fields, a line each."""
    return "\n".join(f"{key}: {value}" for key, value in document["fields"].items() if value.strip())


def about(folder: Path, train: Sequence[Document]) -> tuple[list[str], str]:
    """The labels of a task, sorted, and its instructions."""
    found, path = sorted({it["label"] for it in train}), folder / ABOUT
    if not path.is_file():
        labels, instructions = found, ""
    else:
        description = documents(path, described)[0]
        labels, instructions = description["labels"] or found, description["instructions"]
    if strange := [label for label in found if label not in labels]:
        raise DataError(f"data: {folder / TRAIN}: has the label {strange[0]!r}, which {path} does not name")
    if len(labels) < 2:
        raise DataError(f"data: {folder / TRAIN}: has one label only ({labels[0]!r}); name all of them in {path}")
    return labels, instructions


def described(record: Document) -> Document:
    """What a task.json says: labels, if any, and instructions, if any."""
    columns = record.get("label_columns") or {}
    labels = texts(columns, "Label") if isinstance(columns, dict) and "Label" in columns else []
    return {
        "labels": sorted({label for label in labels if label != "Unlabeled"}),
        "instructions": text({"description": "", **record}, "description").strip(),
    }


def build(spec: Spec) -> Suite:
    """A task of each folder; more than one make a group."""
    data, split = place(spec, FAMILY.data), spec.split or "train"
    data = data.parent if data.is_file() and data.name in (TRAIN, TEST) else data
    folders = [data] if (data / TRAIN).is_file() else sorted(path.parent for path in data.glob(f"*/{TRAIN}"))
    if not folders:
        raise DataError(f"data: {data} holds no {TRAIN}, nor do its folders")
    number = few(spec.num_fewshot, EXAMPLES)
    tasks = [Raft(folder.absolute().name, folder, split, number, spec.seed) for folder in folders]
    if len(tasks) == 1:
        return Suite(tasks)
    return Suite(tasks, [Group(FAMILY.name, tuple(task.name for task in tasks), equal=True)])


FAMILY = Family(
    name="raft",
    summary="RAFT's few-shot classification: leave-one-out on the labelled rows, or predictions for its leaderboard",
    build=build,
    splits=("train", "test"),
    data=f"a task's folder with {TRAIN} and {TEST}, or a folder of such folders",
)
