"""What a task is: documents, what is asked about each, and how the answers are scored.

A family of tasks (MMLU and its subjects, GLUE and its nine) is a module with a `FAMILY`; `eval/registry.py` lists
them. Everything else, batches, answers on disk, standard errors and result files, is the same for all.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.examinee import Examinee
from eval.request import Request
from eval.statistics import Metric

Document = dict[str, Any]  # of JSON values


class Task(ABC):
    """One set of documents with its metrics."""

    name: str
    """As results have it: mmlu_anatomy."""
    alias: str
    """As tables show it: anatomy."""
    version: float = 1
    """Changes when scores can no longer be compared with earlier ones."""
    num_fewshot: int = 0
    output_type: str
    """multiple_choice, loglikelihood, loglikelihood_rolling or generate_until: the harness's words."""
    metrics: Mapping[str, Metric]
    """Named as in results: acc, acc_norm, exact_match."""
    documents: Sequence[Document]
    settings: Mapping[str, Any]
    """What decides the score, for the results' `configs`: data, split, protocol."""

    @abstractmethod
    def requests(self, document: Document, examinee: Examinee) -> Sequence[Request]:
        """What is asked about a document; its answers come back in this order."""

    @abstractmethod
    def score(self, document: Document, answers: Sequence[Any]) -> dict[str, Any]:
        """A value for each metric, which its aggregate takes; one that the document has no part in is left out."""

    @abstractmethod
    def target(self, document: Document) -> Any:
        """What would be right, for the samples; None where nothing is known to be."""

    def prompt(self, document: Document, examinee: Examinee) -> dict[str, Any]:
        """A row of the file that `--prompts` writes."""
        return {
            "task": self.name,
            "input": self.requests(document, examinee)[0].arguments[0],
            "output": self.target(document),
        }

    def write(self, directory: Path, documents: Sequence[Document], answers: Sequence[Sequence[Any]]) -> list[Path]:
        """Files beside the results that only this task has, such as predictions for a leaderboard."""
        return []


@dataclass(frozen=True)
class Group:
    """Tasks whose scores are shown as one number."""

    name: str
    members: tuple[str, ...]
    """Names of tasks or of other groups."""
    alias: str = ""
    equal: bool = False
    """Every task counts the same (macro), not every document (micro)."""
    version: float | None = None
    """As a task's, where the way in which its members become one number has changed once."""


@dataclass(frozen=True)
class Suite:
    """What the name of a task stands for."""

    tasks: Sequence[Task]
    groups: Sequence[Group] = ()


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What was asked for: a name and what goes with it; None stands for the family's default."""

    name: str
    examinee: Examinee
    data: Path | None = None
    protocol: str | None = None
    split: str | None = None
    num_fewshot: int | None = None
    window: int | None = None
    """Tokens in a window, for perplexities; the most tokens of a prompt, for MMLU."""
    max_chars: int | None = None
    """Take this many characters of a text only, from the start."""
    seed: int = 1234


@dataclass(frozen=True, kw_only=True)
class Family:
    """Tasks that are built in one place."""

    name: str
    summary: str
    """One line for `qlora list tasks`."""
    build: Callable[[Spec], Suite]
    """Reads the data; what is not there or cannot be used is refused with a ConfigError or DataError."""
    names: tuple[str, ...] = ()
    """Other names that it answers to: parts of it, groups, presets."""
    protocols: tuple[str, ...] = ()
    """The first is the default; none where there is one way only."""
    splits: tuple[str, ...] = ()
    """The first is the default."""
    data: str = ""
    """What has to lie under the data's path."""
    settings: Mapping[str, Any] = field(default_factory=dict)
