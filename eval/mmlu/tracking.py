"""MMLU measured again and again on a model that changes, as the paper tracks it over a training run.

Everything that does not change is done once: the questions are read, written as prompts and encoded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from eval.answering import BatchSize
from eval.evaluate import Evaluation, answered, questionnaire
from eval.mmlu.family import build
from eval.mode import evaluating
from eval.task import Spec
from models import Model


@dataclass(frozen=True)
class Standing:
    """How a model does on MMLU or on a part of it."""

    accuracy: float
    """The mean over subjects, each of which counts the same, as in the paper's script."""
    stderr: float | None
    """Of that mean; None where a subject has a single question."""
    micro: float
    """The mean over questions."""
    loss: float
    """Of the right letter and the end of the text, in nats per token; the mean over questions."""
    questions: int
    groups: Mapping[str, float]
    """The mean over the subjects of each group that was asked for whole."""
    subjects: Mapping[str, float]


class Examination:
    """Questions, ready to be put to a model."""

    def __init__(self, spec: Spec, limit: int | None = None) -> None:
        """What the spec asks for by protocol qlora, and its data, are read; of its examinee the tokenizer is used.

        `limit` takes so many questions of each subject, from its start.
        """
        self.spec = replace(spec, protocol="qlora")
        self.questions = questionnaire([build(self.spec)], spec.examinee, limit)

    def __len__(self) -> int:
        return sum(len(it.documents) for it in self.questions.asked)

    @property
    def cut(self) -> int:
        """Questions whose prompt is too long, and loses its end."""
        return sum(getattr(it[0], "cut", 0) > 0 for subject in self.questions.asked for it in subject.requests)

    def take(self, model: Model, batch_size: BatchSize = "auto") -> Standing:
        """Ask everything of the model in evaluation mode; its mode is restored, and no random number is drawn."""
        with evaluating(model):
            found = answered(self.questions, replace(self.spec.examinee, loaded=model), batch_size)
        return standing(found, self.spec.name)


def standing(found: Evaluation, name: str) -> Standing:
    """What an evaluation of `name` found."""
    every = {**found.outcomes, **found.groups}
    scores = every[name].scores
    micro = every.get(f"{name}_micro", every[name]).scores  # a single subject has one mean
    parts = {group: it for group, it in found.groups.items() if group != "mmlu" and not group.endswith("_micro")}
    return Standing(
        accuracy=scores["acc"].value,
        stderr=scores["acc"].stderr,
        micro=micro["acc"].value,
        loss=scores["mmlu_loss"].value,
        questions=sum(len(it.documents) for it in found.outcomes.values()),
        groups={group.removeprefix("mmlu_"): it.scores["acc"].value for group, it in parts.items()},
        subjects={it.task.alias: it.scores["acc"].value for it in found.outcomes.values()},
    )
