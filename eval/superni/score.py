"""Answers in a file, whoever wrote them, scored as Tk-Instruct's released script scores them.

    python -m eval.superni.score PREDICTIONS [REFERENCES] [--json]

PREDICTIONS is a file of JSON lines. Rows of predicted_examples.jsonl, as the reference's evaluation and ours leave it,
have "prediction" and bring their references along. Rows of "id" and "prediction" alone need REFERENCES: task files, or
the leaderboard's rows of "id", "references", "task_id" and "task_category". An instance that nothing was predicted for
counts as an empty answer. In the place of a file the words copy-input and copy-demo stand for two baselines, which
answer with the input, and with the first positive example's output.

Printed are ROUGE-L and exact match over all instances, and for each category and task the one it is measured by.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.data.fields import objects, text_of
from eval.data.json_records import ITEMS
from eval.data.records import Record, RecordFile
from eval.superni.metrics import averaged, scores
from eval.superni.prompt import first_output, outputs
from eval.superni.tasks import CATEGORIES, TaskFile, category_name, read_task, task_files
from models.errors import ConfigError, DataError, Refusal

BASELINES = ("copy-input", "copy-demo")


@dataclass(frozen=True)
class Answered:
    """An instance and what was answered."""

    id: str
    prediction: str | None
    references: tuple[str, ...]
    task: str | None
    category: str | None


def score(predictions: str | Path, references: str | Path | None = None, split: str = "test") -> dict[str, Any]:
    """What the reference's script prints, by its names.

    `rougeL` and `exact_match` in percent, to four places; `rougeL_for_data_to_text` and so on for each category and
    each task that is measured by it; `instances`, and how many of them are `missing` from the predictions.
    """
    if predictions in BASELINES:
        if references is None:
            raise ConfigError(f"{predictions} needs task files: name one, a folder, or a clone of the repository")
        answers = list(baseline(str(predictions), Path(references), split))
    else:
        answers = list(read_answers(Path(predictions)))
        if not answers:
            raise DataError(f"data: {predictions} is empty; a row for each answer is needed")
        if references is not None:
            answers = matched(answers, list(read_references(Path(references), split)), Path(predictions))
        elif alone := next((it for it in answers if not it.references), None):
            raise ConfigError(f"{predictions}: the row of {alone.id!r} has no references; give them as the second file")
    return summary(answers)


def summary(answers: Sequence[Answered]) -> dict[str, Any]:
    """The means over all answers, over each category's and over each task's."""
    rows = [scores((it.prediction or "").strip(), it.references) for it in answers]
    found: dict[str, Any] = averaged(rows)
    found |= {"instances": len(answers), "missing": sum(it.prediction is None for it in answers)}
    for group in ("category", "task"):
        groups: dict[str, list[dict[str, float]]] = {}
        metrics: dict[str, tuple[str, ...]] = {}
        for it, row in zip(answers, rows, strict=True):
            name = getattr(it, group)
            if name is not None:
                groups.setdefault(name, []).append(row)
                metrics[name] = (CATEGORIES[it.category],) if it.category in CATEGORIES else tuple(row)
        for name in sorted(groups):
            means = averaged(groups[name])
            found |= {f"{metric}_for_{name}": means[metric] for metric in metrics[name]}
    return found


def baseline(name: str, path: Path, split: str) -> Iterator[Answered]:
    """What a model would answer that copies."""
    for file in task_files(path, split):
        task = read_task(file)
        try:
            demo = first_output(objects(task.head, "Positive Examples")[0]) if name == "copy-demo" else ""
        except ValueError as error:
            raise DataError(f"data: {file}: {error}") from error
        for it in task.instances:
            yield answered(task, it, demo or it["input"])


def read_references(path: Path, split: str) -> Iterator[Answered]:
    """The instances of task files or of a reference file, without an answer."""
    if is_task_data(path):
        for task in map(read_task, task_files(path, split)):
            yield from (answered(task, it, None) for it in task.instances)
        return
    for where, row in rows(path):
        try:
            given = outputs({"output": row.get("references")})
            if not given:
                raise ValueError("references is an empty list; an answer is compared with at least one")
            task, category = text_of(row, "task_id", optional=True) or None, category_name(row.get("task_category"))
            yield Answered(text_of(row, "id"), None, tuple(given), task, category)
        except ValueError as error:
            raise DataError(f"data: {where}: {error}") from error


def is_task_data(path: Path) -> bool:
    """Whether a path stands for task files rather than for rows of references."""
    if path.is_dir():
        return True
    first = next(iter(RecordFile(path).scan()), None)
    return isinstance(first, dict) and ITEMS in first


def answered(task: TaskFile, instance: Record, prediction: str | None) -> Answered:
    return Answered(instance["id"], prediction, tuple(instance["output"]), task.name, task.category)


def read_answers(path: Path) -> Iterator[Answered]:
    """The rows of a file of predictions."""
    for where, row in rows(path):
        try:
            instance = row.get("Instance")
            given = tuple(outputs(instance)) if isinstance(instance, dict) else ()
            id = row.get("id") or (instance or {}).get("id") or where
            yield Answered(
                str(id),
                text_of(row, "prediction", blank=True),
                given,
                row.get("Task"),
                category_name(row.get("Categories")),
            )
        except ValueError as error:
            raise DataError(f"data: {where}: {error}") from error


def rows(path: Path) -> Iterator[tuple[str, Record]]:
    """The records of a file, each with its place."""
    file = RecordFile(path)
    for number, record in enumerate(file.scan()):
        if isinstance(record, ValueError):
            raise DataError(f"data: {file.where(number)}: {record}")
        yield file.where(number), record


def matched(answers: Sequence[Answered], known: Sequence[Answered], path: Path) -> list[Answered]:
    """The known instances, each with what was answered to it."""
    by_id: dict[str, str | None] = {}
    for it in answers:
        if it.id in by_id:
            raise DataError(f"data: {path}: {it.id!r} is answered twice; each instance has one prediction")
        by_id[it.id] = it.prediction
    unknown = by_id.keys() - {it.id for it in known}
    if unknown:
        raise DataError(
            f"data: {path}: {len(unknown)} of {len(by_id)} predictions are for instances that the references do not "
            f"have (one is {min(unknown)!r}); give the references of the same split"
        )
    return [replace(it, prediction=by_id.get(it.id)) for it in known]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.superni.score", description=__doc__.partition("\n")[0])
    parser.add_argument("predictions", help=f"JSON lines with predictions, or {' or '.join(BASELINES)}")
    parser.add_argument("references", nargs="?", help="task files or reference rows; not needed where rows have them")
    parser.add_argument("--split", choices=("test", "train"), default="test", help="of a clone of the repository")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    try:
        found = score(given.predictions, given.references, given.split)
    except Refusal as refusal:
        print(f"score: {refusal}", file=sys.stderr)
        return refusal.exit_code
    print(json.dumps(found) if given.json else "\n".join(f"{name} {value}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
