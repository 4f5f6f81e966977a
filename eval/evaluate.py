"""Tasks put to a model: all questions at once, so that batches are full, then each task's scores from its answers."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.answering import BatchSize, answer_all
from eval.cache import Cache
from eval.examinee import Examinee
from eval.request import Request
from eval.statistics import equal_stderr, pooled_stderr
from eval.task import Document, Group, Suite, Task
from models import DataError


@dataclass(frozen=True)
class Score:
    """A metric's value, its standard error where it has one, and which way is better."""

    value: float
    stderr: float | None
    higher_is_better: bool


@dataclass(frozen=True)
class Outcome:
    """One task: what was asked and answered of each document, and what came of it."""

    task: Task
    documents: Sequence[Document]
    """Those that were evaluated, which with a limit are the first."""
    requests: Sequence[Sequence[Request]]
    answers: Sequence[Sequence[Any]]
    values: Sequence[Mapping[str, Any]]
    """What `Task.score` made of each document."""
    scores: Mapping[str, Score]
    warnings: tuple[str, ...]

    @property
    def cut(self) -> int:
        """Documents of which a prompt was longer than the model takes."""
        return sum(any(getattr(request, "cut", 0) for request in asked) for asked in self.requests)


@dataclass(frozen=True)
class GroupOutcome:
    """A group, with the scores that all of its tasks have."""

    group: Group
    tasks: tuple[str, ...]
    """All tasks below it."""
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found out."""

    outcomes: dict[str, Outcome]
    groups: dict[str, GroupOutcome]


def evaluate(
    suites: Sequence[Suite],
    examinee: Examinee,
    *,
    limit: int | float | None = None,
    batch_size: BatchSize = "auto",
    cache: Cache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Ask everything, then score every task and group.

    `limit` takes so many documents of each task from its start or, below 1, such a share of them.
    """
    tasks = [task for suite in suites for task in suite.tasks]
    documents = [limited(task, limit) for task in tasks]
    asked = [
        [task.requests(document, examinee) for document in chosen]
        for task, chosen in zip(tasks, documents, strict=True)
    ]
    flat = [request for of_task in asked for of_document in of_task for request in of_document]
    answers = iter(answer_all(examinee, flat, batch_size, cache, progress))
    outcomes = {
        task.name: scored(task, chosen, requests, [[next(answers) for _ in each] for each in requests])
        for task, chosen, requests in zip(tasks, documents, asked, strict=True)
    }
    groups = [group for suite in suites for group in suite.groups]
    return Evaluation(outcomes, {group.name: grouped(group, groups, outcomes) for group in groups})


def limited(task: Task, limit: int | float | None) -> Sequence[Document]:
    """The documents of a task that are evaluated."""
    if not len(task.documents):
        raise DataError(f"{task.name}: its data has no documents to evaluate")
    if limit is None:
        return task.documents
    return task.documents[: int(limit) if limit >= 1 else max(1, round(limit * len(task.documents)))]


def scored(
    task: Task,
    documents: Sequence[Document],
    requests: Sequence[Sequence[Request]],
    answers: Sequence[Sequence[Any]],
) -> Outcome:
    """A task's scores. What its metrics warn of, such as a constant prediction, is kept with them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        values = [task.score(document, given) for document, given in zip(documents, answers, strict=True)]
        scores = {}
        for name, metric in task.metrics.items():
            having = [value[name] for value in values if name in value]
            if having:
                value, stderr = metric.aggregate(having), metric.stderr(having)
                scores[name] = Score(float(value), stderr, metric.higher_is_better)
    told = tuple(dict.fromkeys(str(it.message) for it in caught if issubclass(it.category, UserWarning)))
    return Outcome(task, documents, requests, answers, values, scores, told)


def grouped(group: Group, groups: Sequence[Group], outcomes: Mapping[str, Outcome]) -> GroupOutcome:
    """The scores that all tasks of a group have, each a mean over documents or, with `equal`, over tasks."""
    names = leaves(group, {it.name: it for it in groups})
    members = [outcomes[name] for name in names]
    shared = [name for name in members[0].scores if all(name in member.scores for member in members)]
    scores = {}
    for name in shared:
        values = [member.scores[name].value for member in members]
        stderrs = [member.scores[name].stderr for member in members]
        sizes = [sum(name in value for value in member.values) for member in members]
        known = [error for error in stderrs if error is not None]
        stderr = None
        if len(known) == len(stderrs):
            stderr = equal_stderr(known) if group.equal else pooled_stderr(known, sizes)
        weighed = [value * (1 if group.equal else size) for value, size in zip(values, sizes, strict=True)]
        value = math.fsum(weighed) / (len(values) if group.equal else sum(sizes))
        scores[name] = Score(value, stderr, members[0].scores[name].higher_is_better)
    return GroupOutcome(group, names, scores)


def leaves(group: Group, groups: Mapping[str, Group]) -> tuple[str, ...]:
    """The tasks below a group, through groups within it."""
    found = [leaves(groups[name], groups) if name in groups else (name,) for name in group.members]
    return tuple(dict.fromkeys(name for names in found for name in names))
