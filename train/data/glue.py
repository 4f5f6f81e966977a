"""A row of GLUE as an example to learn, for every kind of model: texts with their label, and the same as text.

A task is told by its columns; where two tasks have the same ones, by what the labels are or by the name of the
folder. The table of tasks is evaluation's (`eval/glue/tasks.py`).
"""

from pathlib import Path

from eval.data.records import Record
from eval.glue.tasks import NAMES, TASKS, UNLABELLED, GlueTask, columns_without_header, header_of
from models.errors import DataError
from train.data.example import Example, exchange

__all__ = ["TASKS", "measures", "read", "suits", "table"]


def read(task: GlueTask, record: Record) -> Example:
    """A text or two with their label, and as a question and answer."""
    texts = task.texts_of(record)
    if not any(text.strip() for text in texts):
        raise ValueError(f"{' and '.join(task.texts)} are empty; write one or remove the record")
    prompt, label = task.prompt.format(*texts), task.label_of(record)
    answer = task.written(label)
    made = exchange(prompt, answer, prompt, f" {answer}")
    return Example(made.messages, made.prompt, made.response, texts=texts, label=label)


def suits(task: GlueTask, record: Record, path: Path) -> bool:
    """Whether a record that has a task's columns is one of it."""
    if path.suffix.lower() != ".tsv" or not all(isinstance(record[key], str) for key in task.columns):
        return False
    folder = path.absolute().parent.name.lower()
    if folder in NAMES:
        return folder == task.name
    known = task.telling or (*task.names, *map(str, range(len(task.names))))
    return not task.names or record[task.label] in known


def table(path: Path, text: str, format: str | None) -> tuple[bool, tuple[str, ...]]:
    """Whether a TSV file that begins so is GLUE's, and thus without quotes; and its columns if it has no header.

    A test file is refused: its labels were never published.
    """
    columns = columns_without_header(text)
    if columns:
        return True, columns
    header = set(header_of(text))
    if {"index", "id"} & header and header <= UNLABELLED:
        raise DataError(f"data: {path} has no labels, as GLUE's test files; train on the task's train.tsv")
    told = any(set(task.columns) <= header for task in TASKS)
    return told or (format or "").startswith("glue-"), ()


def measures(format: str, kind: str) -> tuple[str, ...]:
    """What the labels of held-out examples are scored by: as the benchmark does, and elsewhere by what is usual."""
    own = {f"glue-{task.name}": task.measures for task in TASKS}
    return own.get(format, ("accuracy",) if kind == "classification" else ("pearson",))
