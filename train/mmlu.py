"""MMLU while a model learns: the paper's script measures it at each evaluation, and so does this.

A number in metrics.jsonl is the mean over subjects; eval/mmlu.jsonl has every subject. Nothing random is drawn, so a
run with MMLU and one without make the same steps.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from eval.examinee import UNLIMITED, Examinee
from eval.mmlu.family import FAMILY
from eval.mmlu.subjects import NAMES
from eval.mmlu.tracking import Examination
from eval.registry import data_path
from eval.task import Spec
from models import ConfigError, Model, Tokenizer
from models.checkpoint import Description
from models.errors import NonFiniteError
from train.run import Run

JOURNAL = "eval/mmlu.jsonl"


@dataclass(frozen=True, kw_only=True)
class MmluConfig:
    """Whether MMLU is measured at evaluations, and how."""

    data: str | None = None
    """Folder of MMLU with dev, val and test in it, or a file of prompts as qlora.py takes; without it none is asked."""
    task: str = "mmlu"
    """All of it, or a part: mmlu_stem, mmlu_anatomy."""
    split: Literal["val", "test"] | None = None
    """Which questions of a folder are asked; val by default."""
    num_fewshot: int | None = None
    """Solved questions before each one of a folder; 5 by default."""
    max_len: int = 2048
    """Longest prompt in tokens: solved questions are left out until it fits, and else it loses its end."""
    limit: int | None = None
    """Ask so many questions of each subject only, from its start."""
    eval_steps: int | None = None
    """Every so many steps; by default at each evaluation. Before the first and after the last step in any case."""
    batch_size: int | None = None
    """Questions at a time; by default as suits the device, and fewer when memory runs out."""

    def __post_init__(self) -> None:
        if self.task not in ("mmlu", *NAMES):
            raise ValueError(
                f"task {self.task!r} is no part of MMLU; mmlu, mmlu_stem and mmlu_anatomy are, for example"
            )
        if self.data == "":
            raise ValueError("data is empty; leave it out, or name MMLU's folder")
        for name, least in (("num_fewshot", 0), ("max_len", 2), ("limit", 1), ("eval_steps", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")


@dataclass(frozen=True)
class MmluWatcher:
    """Measures MMLU when it is called with a step, and gives a line to show."""

    model: Model
    examination: Examination
    config: MmluConfig
    run: Run

    @property
    def eval_steps(self) -> int | None:
        """How often; None: at each evaluation."""
        return self.config.eval_steps

    def __call__(self, step: int) -> list[str]:
        found = self.examination.take(self.model, self.config.batch_size or "auto")
        if not math.isfinite(found.loss):
            raise NonFiniteError(f"the loss on MMLU after step {step} is {found.loss}")
        error = {} if found.stderr is None else {"accuracy_stderr": found.stderr}
        numbers = {"accuracy": found.accuracy, **error, "accuracy_micro": found.micro, "mmlu_loss": found.loss}
        self.run.append(JOURNAL, step=step, **numbers, groups=dict(found.groups), subjects=dict(found.subjects))
        self.run.metrics(step, "mmlu", **numbers, questions=found.questions)
        return [f"step {step}  {shown(numbers)} on {found.questions} questions"]


def examination(config: MmluConfig, tokenizer: Tokenizer, base: Description) -> Examination | None:
    """The questions that the config asks for, read and encoded; None if it asks for none."""
    if config.data is None:
        return None
    if base.architecture != "llama":
        raise ConfigError("mmlu is measured on a causal language model (LLaMA) only; leave out mmlu.data")
    examinee = Examinee(
        tokenizer=tokenizer, architecture=base.architecture, max_tokens=base.config.max_tokens or UNLIMITED
    )
    spec = Spec(
        name=config.task,
        examinee=examinee,
        data=data_path(config.data, (config.task, FAMILY.name)),
        split=config.split,
        num_fewshot=config.num_fewshot,
        window=config.max_len,
    )
    found = Examination(spec, config.limit)
    if found.cut and config.max_len > examinee.max_tokens:
        raise ConfigError(
            f"mmlu: {found.cut} prompts have more tokens than the {examinee.max_tokens} that the model takes, and "
            f"would lose their question; set mmlu.max_len = {examinee.max_tokens}"
        )
    return found


def remark(found: Examination, config: MmluConfig) -> list[str]:
    """What is asked, and of what a part is lost."""
    said = f"MMLU: {len(found)} questions at each evaluation"
    cut = f"; {found.cut} prompts are longer than {config.max_len} tokens and lose their end" if found.cut else ""
    return [said + cut]


def shown(numbers: dict[str, Any]) -> str:
    """Accuracy with its error, and loss, for people.

    >>> shown({"accuracy": 0.25, "accuracy_stderr": 0.0125, "mmlu_loss": 1.5})
    'MMLU 25.0 % ± 1.2, loss 1.5000'
    """
    error = f" ± {numbers['accuracy_stderr']:.1%}".rstrip("%") if "accuracy_stderr" in numbers else ""
    return f"MMLU {100 * numbers['accuracy']:.1f} %{error}, loss {numbers['mmlu_loss']:.4f}"
