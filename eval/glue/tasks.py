"""GLUE's nine tasks: the columns of their official TSV files, what their labels are called, what they are scored by.

Labels are numbered as in GLUE's own data sets: entailment 0, neutral 1, contradiction 2 for MNLI. The plain form is
T5's ("rte sentence1: ... sentence2: ..."), whose answer is the label's name, and for STS-B the score rounded to a
fifth. Training and evaluation read one table, so that they cannot disagree on what a label means.
"""

import math
import re
from dataclasses import dataclass

from eval.data.records import Record, kind


@dataclass(frozen=True)
class GlueTask:
    """The columns of a task, and the names of its labels in the order of their numbers."""

    name: str
    """That of its folder, in small letters."""
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
    measures: tuple[str, ...] = ("accuracy",)
    """What the benchmark scores it by, as `eval/glue/metrics.py` names it."""

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.texts, self.label)

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.keys, *self.beside)

    def texts_of(self, record: Record) -> tuple[str, ...]:
        """A row's text or two, as they are."""
        for key in self.texts:
            if not isinstance(record.get(key), str):
                found = kind(record[key]) if key in record else "missing"
                raise ValueError(f"{key} is {found}; text is needed")
        return tuple(record[key] for key in self.texts)

    def label_of(self, record: Record) -> int | float:
        """A row's label: the number of a class, or a score."""
        return self.number(record) if self.names else self.score(record)

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

    def written(self, label: int | float) -> str:
        """A label as T5 writes it.

        >>> TASKS[3].written(3.733)
        '3.8'
        """
        return self.names[int(label)] if self.names else f"{round(label * 5) / 5:.1f}"

    def told(self, answer: str) -> int | float | None:
        """The label that a written answer is: a name to the letter, or a number; None for anything else.

        >>> TASKS[8].told(" entailment"), TASKS[8].told("Entailment."), TASKS[3].told("3.8")
        (1, None, 3.8)
        """
        answer = answer.strip()
        if self.names:
            return self.names.index(answer) if answer in self.names else None
        return float(answer) if NUMBER.fullmatch(answer) else None


NUMBER = re.compile(r"[+-]?(\d{1,9}(\.\d*)?|\.\d+)", re.ASCII)
ENTAILED = ("entailment", "not_entailment")
ONE, TWO = ("sentence",), ("sentence1", "sentence2")
PARAPHRASE = ("accuracy", "f1")

TASKS = (
    GlueTask(
        "cola",
        ONE,
        "label",
        ("unacceptable", "acceptable"),
        "cola sentence: {}",
        beside=("mark",),
        measures=("matthews",),
    ),
    GlueTask("sst-2", ONE, "label", ("negative", "positive"), "sst2 sentence: {}"),
    GlueTask(
        "mrpc",
        ("#1 String", "#2 String"),
        "Quality",
        ("not_equivalent", "equivalent"),
        "mrpc sentence1: {} sentence2: {}",
        measures=PARAPHRASE,
    ),
    GlueTask(
        "sts-b",
        TWO,
        "score",
        (),
        "stsb sentence1: {} sentence2: {}",
        beside=("index", "genre"),
        measures=("pearson", "spearman"),
    ),
    GlueTask(
        "qqp",
        ("question1", "question2"),
        "is_duplicate",
        ("not_duplicate", "duplicate"),
        "qqp question1: {} question2: {}",
        measures=PARAPHRASE,
    ),
    GlueTask(
        "mnli",
        TWO,
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        "mnli hypothesis: {1} premise: {0}",
    ),
    GlueTask("qnli", ("question", "sentence"), "label", ENTAILED, "qnli question: {} sentence: {}", beside=("index",)),
    GlueTask("rte", TWO, "label", ENTAILED, "rte sentence1: {} sentence2: {}", beside=("index",), telling=ENTAILED),
    GlueTask(
        "wnli",
        TWO,
        "label",
        ENTAILED[::-1],
        "wnli sentence1: {} sentence2: {}",
        beside=("index",),
        telling=("0", "1"),
    ),
)
NAMES = tuple(task.name for task in TASKS)

COLA = ("source", "label", "mark", "sentence")  # its train.tsv and dev.tsv have no header
UNLABELLED = {  # columns that test files consist of
    *("index", "id", "genre", "filename", "year", "old_index", "source1", "source2", "promptID", "pairID"),
    *("sentence", "sentence1", "sentence2", "question", "question1", "question2"),
    *("#1 ID", "#2 ID", "#1 String", "#2 String"),
    *("sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"),
}


def header_of(text: str) -> list[str]:
    """The fields of a table's first line."""
    return text.partition("\n")[0].rstrip("\r").split("\t")


def columns_without_header(text: str) -> tuple[str, ...]:
    """The columns of a table that begins with a row at once, as CoLA's does (its marks are *, ?, ?* ...); else none."""
    first = header_of(text)
    return COLA if len(first) == len(COLA) and first[1] in ("0", "1") and set(first[2]) <= set("*?#%") else ()
