"""A multiple choice that is decided by likelihood: the answer is the choice that a model finds most probable.

A document is {"query", "choices", "gold"}: the choices follow the query, after a space. Or it is {"choices",
"continuation", "gold"}: the choices are beginnings, and the score of each is the probability of the one continuation
that all of them share. `gold` is the number of the right choice, from 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.examinee import Examinee
from eval.likelihood import likelihood
from eval.request import Request
from eval.statistics import MEAN, Metric
from eval.task import Document, Task
from models import ConfigError

BETWEEN = "\n\n"  # stands after every example, as in the harness


class Choice(Task):
    """Accuracy by the sum of a choice's log-probabilities (acc), and by that sum per character (acc_norm)."""

    output_type = "multiple_choice"

    def __init__(
        self,
        name: str,
        documents: Sequence[Document],
        examples: Sequence[Document] = (),
        metrics: Sequence[str] = ("acc", "acc_norm"),
        version: float = 1,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """The examples stand in the prompt of every document, with their right answers."""
        self.name = self.alias = name
        self.documents = documents
        self.metrics: Mapping[str, Metric] = dict.fromkeys(metrics, MEAN)
        self.version = version
        self.num_fewshot = len(examples)
        self.settings = settings or {}
        self.shown = "".join(" ".join(pairs(it)[it["gold"]]) + BETWEEN for it in examples)

    def requests(self, document: Document, examinee: Examinee) -> list[Request]:
        return [likelihood(examinee, self.shown + before, f" {after}") for before, after in pairs(document)]

    def score(self, document: Document, answers: Sequence[Any]) -> dict[str, Any]:
        sums = [answer[0] for answer in answers]
        # Characters, not bytes or tokens: what the harness divides by.
        each = [value / len(choice) for value, choice in zip(sums, document["choices"], strict=True)]
        right = {"acc": best(sums) == document["gold"], "acc_norm": best(each) == document["gold"]}
        return {metric: float(right[metric]) for metric in self.metrics}

    def target(self, document: Document) -> int:
        return document["gold"]

    def prompt(self, document: Document, examinee: Examinee) -> dict[str, Any]:
        before, after = self.requests(document, examinee)[document["gold"]].arguments
        return {"task": self.name, "input": before, "output": after.removeprefix(" ")}


def pairs(document: Document) -> list[tuple[str, str]]:
    """For each choice, what stands before the text that is scored, and that text."""
    if "continuation" in document:
        return [(choice, document["continuation"]) for choice in document["choices"]]
    return [(document["query"], choice) for choice in document["choices"]]


def best(values: Sequence[float]) -> int:
    """The number of the largest value; of equal ones the first, as in the harness.

    >>> best([-3.0, -1.0, -1.0])
    1
    """
    return max(range(len(values)), key=values.__getitem__)


def set_apart(documents: Sequence[Document], number: int, where: str) -> tuple[Sequence[Document], Sequence[Document]]:
    """The first documents, as examples, and the others, which are scored."""
    if number >= len(documents):
        raise ConfigError(
            f"num_fewshot is {number}, but {where} has {len(documents)} record(s), and one at least has to be scored; "
            "ask for fewer, or put a training file beside it"
        )
    return documents[:number], documents[number:]


def first(documents: Sequence[Document], number: int, where: str) -> Sequence[Document]:
    """The first documents of a training file."""
    if number > len(documents):
        raise ConfigError(f"num_fewshot is {number}, but {where} has {len(documents)} record(s)")
    return documents[:number]


def few(number: int | None, default: int = 0) -> int:
    """How many examples are wanted."""
    if number is not None and number < 0:
        raise ConfigError(f"num_fewshot is {number}; it must be 0 or more")
    return default if number is None else number
