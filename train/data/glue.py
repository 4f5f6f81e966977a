"""GLUE's nine tasks as its official TSV files have them: texts, their label, and the same as text for T5.

A task is told by its columns; where two tasks have the same ones, by what the labels are or by the name of the
folder. Labels are numbered as in GLUE's own data sets: entailment 0, neutral 1, contradiction 2 for MNLI. The
plain form is T5's ("rte sentence1: ... sentence2: ..."), whose answer is the label's name, and for STS-B the
score rounded to a fifth.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from eval.data.fields import text_of
from eval.data.records import Record, kind
from models.errors import DataError
from train.data.example import Example, exchange


@dataclass(frozen=True)
class Task:
    """The columns of a task, and the names of its labels in the order of their numbers."""

    name: str
    texts: tuple[str, ...]
    label: str
    names: tuple[str, ...]
    """None for STS-B, whose label is a score from 0 to 5."""
    prompt: str
    """T5's form of the texts."""
    beside: tuple[str, ...] = ()
    """Other columns that tell the task from tables of anything else."""
    telling: tuple[str, ...] = ()
    """Labels as the file has them, for a task that shares its columns with another."""

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.texts, self.label)

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.keys, *self.beside)

    def number(self, record: Record) -> int:
        """A label's number; files have its name or the number itself."""
        given = record[self.label]
        if isinstance(given, str) and given in self.names:
            return self.names.index(given)
        if not isinstance(given, bool) and str(given) in map(str, range(len(self.names))):
            return int(given)
        known = ", ".join(f"{i} or {name}" for i, name in enumerate(self.names))
        raise ValueError(f"{self.label} is {given!r:.80}; {self.name}'s are {known}")

    def score(self, record: Record) -> float:
        given = record[self.label]
        try:
            score = math.nan if isinstance(given, (bool, list, dict)) or given is None else float(given)
        except (ValueError, OverflowError):
            score = math.nan
        if not 0 <= score <= 5:
            shown = f"{given!r:.80}" if isinstance(given, (str, float, int)) else kind(given)
            raise ValueError(f"{self.label} is {shown}; a score from 0 to 5 is needed")
        return score

    def suits(self, record: Record, path: Path) -> bool:
        """Whether a record that has the columns is one of this task."""
        if path.suffix.lower() != ".tsv" or not all(isinstance(record[key], str) for key in self.columns):
            return False
        folder = path.absolute().parent.name.lower()
        if folder in NAMES:
            return folder == self.name
        known = self.telling or (*self.names, *map(str, range(len(self.names))))
        return not self.names or record[self.label] in known

    def read(self, record: Record) -> Example:
        """A text or two with their label, and as a question and answer."""
        texts = tuple(text_of(record, key, blank=True) for key in self.texts)
        if not any(text.strip() for text in texts):
            raise ValueError(f"{' and '.join(self.texts)} are empty; write one or remove the record")
        prompt = self.prompt.format(*texts)
        if self.names:
            label = self.number(record)
            answer = self.names[label]
        else:
            label = self.score(record)
            answer = f"{round(label * 5) / 5:.1f}"
        made = exchange(prompt, answer, prompt, f" {answer}")
        return Example(made.messages, made.prompt, made.response, texts=texts, label=label)


ENTAILED = ("entailment", "not_entailment")
ONE, TWO = ("sentence",), ("sentence1", "sentence2")

TASKS = (
    Task("cola", ONE, "label", ("unacceptable", "acceptable"), "cola sentence: {}", ("mark",)),
    Task("sst-2", ONE, "label", ("negative", "positive"), "sst2 sentence: {}"),
    Task(
        "mrpc",
        ("#1 String", "#2 String"),
        "Quality",
        ("not_equivalent", "equivalent"),
        "mrpc sentence1: {} sentence2: {}",
    ),
    Task("sts-b", TWO, "score", (), "stsb sentence1: {} sentence2: {}", ("index", "genre")),
    Task(
        "qqp",
        ("question1", "question2"),
        "is_duplicate",
        ("not_duplicate", "duplicate"),
        "qqp question1: {} question2: {}",
    ),
    Task(
        "mnli",
        TWO,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        "mnli hypothesis: {1} premise: {0}",
    ),
    Task("qnli", ("question", "sentence"), "label", ENTAILED, "qnli question: {} sentence: {}", ("index",)),
    Task("rte", TWO, "label", ENTAILED, "rte sentence1: {} sentence2: {}", ("index",), ENTAILED),
    Task("wnli", TWO, "label", ENTAILED[::-1], "wnli sentence1: {} sentence2: {}", ("index",), ("0", "1")),
)
NAMES = tuple(task.name for task in TASKS)

COLA = ("source", "label", "mark", "sentence")  # its train.tsv and dev.tsv have no header
UNLABELLED = {  # columns that test files consist of
    *("index", "id", "genre", "filename", "year", "old_index", "source1", "source2", "promptID", "pairID"),
    *("sentence", "sentence1", "sentence2", "question", "question1", "question2"),
    *("#1 ID", "#2 ID", "#1 String", "#2 String"),
    *("sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"),
}


def table(path: Path, text: str, format: str | None) -> tuple[bool, tuple[str, ...]]:
    """Whether a TSV file that begins so is GLUE's, and thus without quotes; and its columns if it has no header.

    A test file is refused: its labels were never published.
    """
    header = text.partition("\n")[0].rstrip("\r").split("\t")
    if len(header) == len(COLA) and header[1] in ("0", "1") and header[2] in ("", "*"):
        return True, COLA
    if {"index", "id"} & set(header) and set(header) <= UNLABELLED:
        raise DataError(f"data: {path} has no labels, as GLUE's test files; train on the task's train.tsv")
    told = any(set(task.columns) <= set(header) for task in TASKS)
    return told or (format or "").startswith("glue-"), ()
