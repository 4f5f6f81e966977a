"""MMLU's questions as they were published, and as the paper's script takes them.

The published layout is DIR/{dev,val,test}/SUBJECT_SPLIT.csv: no header, six columns, namely the question, four choices
and the letter of the right one. Some questions contain Windows line ends, which are part of the text; only in a file
that has no other line ends, as copying through Windows leaves it, are they taken for plain ones.

The paper's script takes one file of ready prompts, a line each: {"subject", "input", "output"}.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.data.records import RecordFile, opened, printable
from eval.data.tables import WrongWidth
from eval.mmlu.protocols import LETTERS
from eval.mmlu.subjects import SUBJECTS
from models.errors import DataError

SPLITS = ("test", "val", "dev")
COLUMNS = ("question", *LETTERS, "answer")


def read_questions(directory: Path, split: str, subjects: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The questions of each subject, with the keys that the harness's documents have; `answer` is 0 to 3.

    A file that is missing, empty or has a row that is no question is a DataError.
    """
    paths = {subject: directory / split / f"{subject}_{split}.csv" for subject in subjects}
    missing = [subject for subject, path in paths.items() if not path.is_file()]
    if missing:
        raise lacking(
            f"{directory / split} has no {paths[missing[0]].name}" + counted(missing, "file"), subjects, missing
        )
    return {subject: list(questions(path, subject)) for subject, path in paths.items()}


def questions(path: Path, subject: str) -> Iterator[dict[str, Any]]:
    """The questions of one file."""
    with opened(path) as stream:
        content = stream.read()
    mixed = content.count(b"\r\n") < content.count(b"\n")
    file = RecordFile(path, COLUMNS, exact=mixed)
    for number, row in enumerate(file.scan()):
        where = file.where(number)
        if isinstance(row, WrongWidth):
            raise DataError(f"data: {where}: {row}; question, four choices and the answer's letter are expected")
        if isinstance(row, ValueError):
            raise DataError(f"data: {where}: {row}")
        if not row["question"].strip():
            raise DataError(f"data: {where}: the question is empty")
        yield {
            "question": row["question"],
            "subject": subject,
            "choices": [row[letter] for letter in LETTERS],
            "answer": LETTERS.index(letter_of(row["answer"], where)),
        }
    if not len(file):
        raise DataError(f"data: {path} has no questions; it is empty")


def read_prompts(path: Path, subjects: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The ready prompts of each of some subjects; a subject without any, or a row that is no prompt, is a DataError."""
    file = RecordFile(path)
    found: dict[str, list[dict[str, Any]]] = {subject: [] for subject in subjects}
    for number, row in enumerate(file.scan()):
        where = file.where(number)
        if isinstance(row, ValueError):
            raise DataError(f"data: {where}: {row}")
        for name in ("subject", "input", "output"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise DataError(
                    f"data: {where}: {name!r} is no text; a prompt has a subject, an input and, as output, a letter"
                )
        if row["subject"] not in SUBJECTS:
            raise DataError(f"data: {where}: {printable(row['subject'])[:60]!r} is no subject of MMLU")
        letter_of(row["output"], where)
        if row["subject"] in found:
            found[row["subject"]].append({name: row[name] for name in ("subject", "input", "output")})
    missing = [subject for subject, prompts in found.items() if not prompts]
    if missing:
        raise lacking(f"{path} has no prompts about {missing[0]}" + counted(missing, "subject"), subjects, missing)
    return found


def letter_of(value: str, where: str) -> str:
    if value not in LETTERS:
        shown = printable(value)[:40]
        raise DataError(f"data: {where}: the answer is {shown!r}; A, B, C or D is expected, and no header")
    return value


def counted(missing: Sequence[str], what: str) -> str:
    return f", and {len(missing) - 1} more {what}s are missing" if len(missing) > 1 else ""


def lacking(what: str, subjects: Sequence[str], missing: Sequence[str]) -> DataError:
    """What is missing, and that subjects which are there can be asked for by name."""
    there = [subject for subject in subjects if subject not in missing]
    hint = f"; ask for what is there, such as mmlu_{there[0]}, or complete the data" if there else ""
    return DataError(f"data: {what}{hint}")
