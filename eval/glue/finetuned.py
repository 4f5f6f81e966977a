"""GLUE as a model was fine-tuned for it: a RoBERTa gives the logits of a task's labels, a T5 or LLaMA writes one.

A RoBERTa has learned one task. Its logits are matched to the task's labels by their names, where it has any; what it
was trained on is told by its run or, without one, by those names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.examinee import Examinee
from eval.generation import generation
from eval.glue.documents import Documents
from eval.glue.task import GluePart
from eval.glue.tasks import TASKS, GlueTask
from eval.labelling import label
from eval.request import Request
from eval.task import Document
from models import ConfigError
from models.readers import read_json
from models.roberta import Roberta
from models.roberta_config import numbered_labels
from models.target import read_run

ANSWER_TOKENS = 16  # enough for the longest label, not_entailment, in any vocabulary
NO_LABEL = -1  # stands for an answer that is none, as in T5's own evaluation


class Labelled(GluePart):
    """The label is that of the largest logit (of equal ones the first), or the one number of a regression."""

    output_type = "label"

    def __init__(self, found: Documents, examinee: Examinee, most: int | None = None) -> None:
        self.columns = columns(found.part.task, examinee)
        self.most = most if most is not None else trained_length(examinee.run)
        super().__init__(found, "finetune", {"max_len": min(self.most or examinee.max_tokens, examinee.max_tokens)})

    def requests(self, document: Document, examinee: Examinee) -> list[Request]:
        return [label(examinee, document["texts"], self.most)]

    def prediction(self, document: Document, answers: Sequence[Any]) -> int | float:
        logits = answers[0]
        if not self.task.names:
            return float(logits[0])
        values = [logits[column] for column in self.columns]
        return values.index(max(values))

    def prompt(self, document: Document, examinee: Examinee) -> dict[str, Any]:
        """What stands between the first mark and the last."""
        shown = "</s></s>".join(document["texts"])
        return {"task": self.name, "input": f"<s>{shown}</s>", "output": self.target(document)}


class Written(GluePart):
    """The label is the one whose name is written to the letter, or for STS-B the number that is.

    Anything else is -1, in T5's way: wrong for the accuracy, a class of its own for Matthews' correlation, a number as
    any other for STS-B, and for F1 the other label than the right one.
    """

    output_type = "generate_until"

    def __init__(self, found: Documents) -> None:
        super().__init__(found, "finetune")

    def requests(self, document: Document, examinee: Examinee) -> list[Request]:
        prompt = self.task.prompt.format(*document["texts"])
        if examinee.architecture == "t5":
            prompt = prompt.strip()  # as it is trained
        return [generation(examinee, prompt, ANSWER_TOKENS, stop=("\n",))]

    def prediction(self, document: Document, answers: Sequence[Any]) -> int | float:
        told = self.task.told(answers[0])
        return NO_LABEL if told is None else told

    def score(self, document: Document, answers: Sequence[Any]) -> dict[str, Any]:
        values = super().score(document, answers)
        if "f1" in values and values["f1"][1] == NO_LABEL:
            values["f1"] = [document["label"], 1 - document["label"]]
        return values


def columns(task: GlueTask, examinee: Examinee) -> tuple[int, ...]:
    """Which logit is that of each label of a task. Where no model is loaded, as for a file of prompts, they are alike.

    A model with other labels is refused; names that only count ("LABEL_0") are taken to count as GLUE does.
    """
    count = max(len(task.names), 1)
    if examinee.loaded is None:
        return tuple(range(count))
    names = label_names(examinee)
    wanted = "a number" if not task.names else ", ".join(task.names)
    if len(names) != count:
        gives = "a number" if len(names) == 1 else f"one of {len(names)} labels ({', '.join(names)})"
        raise ConfigError(f"{task.name} needs {wanted}, but this model gives {gives}; it was trained for another task")
    if not task.names or names in (numbered_labels(count), tuple(map(str, range(count)))):
        return tuple(range(count))
    lower = [name.lower() for name in names]
    if set(lower) != set(task.names):
        raise ConfigError(f"{task.name}'s labels are {wanted}, but this model's are {', '.join(names)}")
    return tuple(lower.index(name) for name in task.names)


def label_names(examinee: Examinee) -> tuple[str, ...]:
    """The labels of a model by the number of their logit; a model without such a head is refused."""
    model = examinee.model
    if not isinstance(model, Roberta) or model.classifier is None:
        raise ConfigError(
            "glue-finetune needs a RoBERTa with a head that gives labels, but this one fills masks; give the run that "
            "was fine-tuned for the task (qlora train), or a checkpoint with a classification head"
        )
    return model.config.labels


def trained_for(examinee: Examinee) -> GlueTask:
    """The task that a RoBERTa was fine-tuned for; where that cannot be told, it has to be named."""
    if examinee.run is not None:
        format = str(read_json(examinee.run / "data" / "manifest.json").get("format"))
        for task in TASKS:
            if format == f"glue-{task.name}":
                return task
    if examinee.loaded is None:
        raise ConfigError("glue: which task the model was fine-tuned for cannot be told; name it, as in --task rte")
    names = label_names(examinee)
    able = [task for task in TASKS if max(len(task.names), 1) == len(names)]
    exact = [task for task in able if set(task.names) == {name.lower() for name in names}]
    able = exact or able
    if len(able) != 1:
        which = f"it may be {' or '.join(task.name for task in able)}" if able else "GLUE has no task with such"
        raise ConfigError(
            f"glue: which task the model was fine-tuned for cannot be told from its labels, {', '.join(names)}; "
            f"{which}. Name it, as in --task rte"
        )
    return able[0]


def trained_length(run: Path | None) -> int | None:
    """The limit to which a run cut its texts."""
    if run is None:
        return None
    data = read_run(run / "config.toml").get("data")
    most = data.get("max_len") if isinstance(data, dict) else None
    return most if isinstance(most, int) else None
