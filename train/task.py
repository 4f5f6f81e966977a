"""What a run learns: it follows from the kind of its model and of its data, and what does not fit is refused.

A LLaMA writes on from a text, a T5 writes another text; either writes a label as text, where the data says how. A
RoBERTa gives a text a class or a number.
"""

from dataclasses import dataclass, replace
from typing import Any

from models import ConfigError, DataError, PrefixConfig
from models.checkpoint import Description
from train.data.dataset import Task
from train.data.examples import Examples, open_examples
from train.recipe import RunConfig

TASKS: dict[str, tuple[Task, ...]] = {
    "llama": ("causal",),
    "t5": ("seq2seq",),
    "roberta": ("classification", "regression"),
}
NAMES = {"llama": "a LLaMA", "t5": "a T5", "roberta": "a RoBERTa"}
CLASSIFIER = "classifier"  # the module that gives the label, in all RoBERTas


@dataclass(frozen=True)
class Plan:
    """What a run learns."""

    config: RunConfig
    """With its task in it, and what follows from that."""
    task: Task
    labels: tuple[str, ...] = ()
    """The classes of its data by number."""


def plan(config: RunConfig, base: Description) -> Plan:
    """Decide the task of a run from its checkpoint and, for a RoBERTa, from the labels of its data.

    The classifier is trained whole, in float32, whether it is new or not: the label hangs on it alone.
    """
    able = TASKS[base.architecture]
    if config.task not in ("auto", *able):
        raise ConfigError(
            f"task is {config.task!r}, but {config.model} is {NAMES[base.architecture]}, which learns "
            f"{' or '.join(able)}; leave task at auto, or give another model"
        )
    if not config.adapters and base.quantized:
        raise ConfigError(
            f"adapters is false, but {config.model} is stored in 4 bits, and those cannot be trained; "
            "give the original checkpoint, or train adapters"
        )
    if config.method == "prefix" and base.architecture != "llama":
        raise ConfigError(
            f"method is prefix, but {config.model} is {NAMES[base.architecture]}, and prefixes are for a LLaMA here; "
            "choose lora, ia3 or bitfit"
        )
    if base.architecture != "roberta":
        return Plan(replace(config, task=able[0]), able[0])

    examples = open_examples(config.data.path, config.data.format)
    task = label_task(config, examples)
    data = config.data if config.data.max_len is not None else replace(config.data, max_len=base.config.max_tokens)
    config = replace(config, task=task, data=data)
    adapter = config.adapter
    if config.adapters and not isinstance(adapter, PrefixConfig) and CLASSIFIER not in adapter.modules_to_save:
        adapter = replace(adapter, modules_to_save=(*adapter.modules_to_save, CLASSIFIER))
        chosen: dict[str, Any] = {config.method: adapter}
        config = replace(config, **chosen)
    return Plan(config, task, tuple(examples.label_names))


def label_task(config: RunConfig, examples: Examples) -> Task:
    """Classes or numbers, as the data has them; other labels than the config asks for are refused, and none too."""
    where = f"{config.data.path} ({examples.format})"
    if examples.kind == "text":
        raise ConfigError(
            f"data: {where} has texts to write, but {config.model} is a RoBERTa, which gives labels; "
            "give data with labels, or a LLaMA or T5"
        )
    task = examples.kind if config.task == "auto" else config.task
    if task != examples.kind:
        what = {"classification": "classes", "regression": "numbers"}
        raise ConfigError(f"data: {where} has {what[examples.kind]} for labels, but task = {task!r} needs {what[task]}")
    if task == "classification" and len(examples.label_names) < 2:
        only = ", ".join(examples.label_names)
        raise DataError(f"data: {where} has one class, {only}; at least two are needed to tell apart")
    return task
