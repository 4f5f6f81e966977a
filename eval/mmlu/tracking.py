"""MMLU measured again and again on a model that changes, as the paper tracks it over a training run.

Everything that does not change is done once: the questions are read, written as prompts and encoded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from eval.answering import BatchSize, answer_all
from eval.examinee import Examinee
from eval.mmlu.subjects import SUBJECTS
from eval.mmlu.task import Subject
from eval.request import Request
from eval.statistics import equal_stderr, mean, mean_stderr
from eval.task import Document
from models import Model


@dataclass(frozen=True)
class Standing:
    """How a model does: mean accuracies, and of them the mean over subjects."""

    accuracy: float
    """Every subject counts the same, as in the paper's script."""
    stderr: float | None
    """Of that mean; None where a subject has a single question."""
    micro: float
    """Every question counts the same."""
    loss: float
    """Of the right letter and the end of the text, in nats per token, over all questions."""
    questions: int
    groups: Mapping[str, float]
    """The mean over the subjects of each group that there is."""
    subjects: Mapping[str, float]


class Examination:
    """Questions, ready to be put to a model."""

    def __init__(self, tasks: Sequence[Subject], examinee: Examinee, limit: int | None = None) -> None:
        """`limit` takes so many questions of each subject, from its start. The examinee needs no model yet."""
        self.examinee = examinee
        self.asked: list[tuple[Subject, Document, list[Request]]] = [
            (task, document, task.requests(document, examinee)) for task in tasks for document in task.documents[:limit]
        ]

    @property
    def cut(self) -> int:
        """Questions whose prompt is too long, and loses its end."""
        return sum(getattr(requests[0], "cut", 0) > 0 for _, _, requests in self.asked)

    def take(self, model: Model, batch_size: BatchSize = "auto") -> Standing:
        """Ask everything of the model in evaluation mode; its mode is restored, and no random number is drawn."""
        training = model.training
        model.eval()
        try:
            flat = [request for _, _, requests in self.asked for request in requests]
            answers = iter(answer_all(replace(self.examinee, loaded=model), flat, batch_size))
        finally:
            model.train(training)
        scores: dict[str, list[dict[str, float]]] = {}
        for task, document, requests in self.asked:
            given = [next(answers) for _ in requests]
            scores.setdefault(task.subject, []).append(task.score(document, given))
        return standing(scores)


def standing(scores: Mapping[str, list[dict[str, float]]]) -> Standing:
    """The means of what each question of each subject was worth."""
    right = {subject: [it["acc"] for it in found] for subject, found in scores.items()}
    subjects = {subject: mean(values) for subject, values in right.items()}
    groups: dict[str, list[float]] = {}
    for subject, value in subjects.items():
        groups.setdefault(SUBJECTS[subject], []).append(value)
    errors = [mean_stderr(values) for values in right.values()]
    known = [error for error in errors if error is not None]
    every = [it for found in scores.values() for it in found]
    return Standing(
        accuracy=mean(list(subjects.values())),
        stderr=equal_stderr(known) if len(known) == len(errors) else None,
        micro=mean([it["acc"] for it in every]),
        loss=mean([it["mmlu_loss"] for it in every]),
        questions=len(every),
        groups={name: mean(values) for name, values in groups.items()},
        subjects=subjects,
    )
