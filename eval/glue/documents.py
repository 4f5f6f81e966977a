"""Where GLUE's data lies, and its rows as documents to evaluate.

A folder holds one for each task under its official name, in letters of any case: CoLA, SST-2, MRPC, STS-B, QQP, MNLI,
QNLI, RTE, WNLI, and the diagnostics AX. A task's own folder, or a single file, will do for one task. MNLI has two parts
with a score each, `mnli` (matched) and `mnli_mismatch`. Test files have no labels; what is predicted for them is for
the benchmark's server to score.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval.data.records import Record, RecordFile, beginning
from eval.data.tables import WrongWidth
from eval.glue.tasks import TASKS, GlueTask, columns_without_header
from eval.task import Document
from models.errors import ConfigError, DataError

BY_NAME = {task.name: task for task in TASKS}


@dataclass(frozen=True)
class Part:
    """Documents that have a score of their own: those of a task, or a part of MNLI's."""

    name: str
    task: GlueTask
    folders: tuple[str, ...]
    """Names of its folder, in small letters."""
    files: Mapping[str, tuple[str, ...]]
    """The files of each split, of which the first that is there is taken."""
    submission: str
    """The leaderboard's name for a file of predictions."""


def part(name: str, submission: str, **files: tuple[str, ...]) -> Part:
    """A part with the usual files, where no others are given."""
    folder = submission.removesuffix(".tsv").lower()
    usual = {split: (f"{split}.tsv",) for split in ("dev", "train", "test")}
    return Part(name, BY_NAME[folder], (folder, folder.replace("-", "")), usual | files, submission)


MNLI = BY_NAME["mnli"]
PARTS = {
    it.name: it
    for it in (
        part("cola", "CoLA.tsv"),
        part("sst2", "SST-2.tsv"),
        part(
            "mrpc",
            "MRPC.tsv",
            train=("train.tsv", "msr_paraphrase_train.txt"),
            test=("test.tsv", "msr_paraphrase_test.txt"),
        ),
        part("qqp", "QQP.tsv"),
        part("stsb", "STS-B.tsv"),
        Part(
            "mnli",
            MNLI,
            ("mnli",),
            {
                "dev": ("dev_matched.tsv", "dev.tsv"),
                "train": ("train.tsv",),
                "test": ("test_matched.tsv", "test.tsv"),
            },
            "MNLI-m.tsv",
        ),
        Part(
            "mnli_mismatch",
            MNLI,
            ("mnli",),
            {"dev": ("dev_mismatched.tsv",), "test": ("test_mismatched.tsv",)},
            "MNLI-mm.tsv",
        ),
        part("qnli", "QNLI.tsv"),
        part("rte", "RTE.tsv"),
        part("wnli", "WNLI.tsv"),
        Part("ax", MNLI, ("ax", "diagnostic", "diagnostics", "mnli"), {"test": ("diagnostic.tsv",)}, "AX.tsv"),
    )
}


@dataclass(frozen=True)
class Documents:
    """Rows of a part: `row` counts them, `idx` is the file's own number, `label` is None where the file has none."""

    part: Part
    path: Path
    split: str
    rows: Sequence[Document] = field(repr=False)
    labelled: bool = True


def documents(part: Part, data: Path, split: str, named: bool = True) -> Documents | None:
    """The documents of a split, or None where a folder does not have them.

    `named` says that this part was asked for by its name, so that a folder of any name may be its own.
    """
    path = found(part, data, split, named)
    return None if path is None else read(part, path, split)


def needed(part: Part, data: Path, split: str) -> Documents:
    """The same; what is not there is refused."""
    read = documents(part, data, split)
    if read is None:
        wanted = part.files.get(split)
        if wanted is None:
            raise ConfigError(f"{part.name} has no split {split!r}; it has {', '.join(part.files)}")
        folder = part.submission.removesuffix(".tsv") if part.task is not MNLI else "MNLI"
        raise DataError(
            f"data: {data} has no {' or '.join(wanted)} for {part.name}; "
            f"give the folder that holds {folder}, or {folder} itself, or the file"
        )
    return read


def found(part: Part, data: Path, split: str, named: bool) -> Path | None:
    """The file of a split."""
    if not data.exists():
        raise DataError(f"data: {data} does not exist; give a folder with GLUE's data")
    if not data.is_dir():
        return data if named else None
    for folder in folders(part, data, named):
        there = {path.name.lower(): path for path in folder.iterdir() if path.is_file()}
        for name in part.files.get(split, ()):
            if name in there:
                return there[name]
    return None


def folders(part: Part, data: Path, named: bool) -> list[Path]:
    """Folders that may hold a part's files: below the one given, and that one, unless it is another task's."""
    below = {path.name.lower(): path for path in sorted(data.iterdir()) if path.is_dir()}
    own = data.absolute().name.lower()
    others = {name for it in PARTS.values() for name in it.folders} - set(part.folders)
    itself = own in part.folders or (named and own not in others)
    return [below[name] for name in part.folders if name in below] + ([data] if itself else [])


def read(part: Part, path: Path, split: str) -> Documents:
    """All rows of a file; one that cannot be used is refused with its line."""
    plain = path.suffix.lower() in (".tsv", ".txt")
    columns = columns_without_header(beginning(path)) if plain else ()
    file = RecordFile(path, columns, plain)
    rows: list[Document] = []
    labelled, broken = True, 0
    for number, record in enumerate(file.scan()):
        try:
            if isinstance(record, WrongWidth) and part.name == "qqp" and split != "test":
                broken += 1  # as the published files of this task have some
                continue
            if isinstance(record, ValueError):
                raise record
            if not rows:
                labelled = has_labels(part.task, record, split)
            rows.append(document(part.task, record, len(rows), labelled))
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"data: {file.where(number)}: {error}") from error
    if not rows:
        raise DataError(f"data: {path} is empty; at least one row is needed")
    if broken:
        logging.getLogger(__name__).warning("%s: %d rows with another number of fields are left out", path, broken)
    return Documents(part, path, split, rows, labelled)


def has_labels(task: GlueTask, record: Record, split: str) -> bool:
    """Whether the rows are labelled; what is there of a table that is not this task's is told."""
    missing = [key for key in task.texts if key not in record]
    if missing:
        raise ValueError(f"has no column {' or '.join(missing)}, as {task.name} has; found {', '.join(record)[:200]}")
    if task.label not in record and split != "test":
        raise ValueError(
            f"has no column {task.label}, so there is nothing to score by; test files are evaluated with --split test"
        )
    return task.label in record


def document(task: GlueTask, record: Record, number: int, labelled: bool) -> Document:
    index = record.get("index", record.get("id", number))
    if isinstance(index, str) and index.isascii() and index.isdigit():
        index = int(index)
    if labelled and task.label not in record:
        raise ValueError(f"{task.label} is missing, which the rows before have")
    label = task.label_of(record) if labelled else None
    return {"row": number, "idx": index, "texts": list(task.texts_of(record)), "label": label}
