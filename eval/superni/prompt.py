"""Tk-Instruct's prompt, byte for byte: a task's definition, some solved examples, and the instance to solve.

    Definition: Say which colour is meant.

     Positive Example 1 -
    Input: Of grass?
     Output: green.

    Now complete the following example -
    Input: Of coal.
    Output:

Every part ends with a full stop unless it ends with punctuation; a space stands before "Positive" and before the
examples' "Output", and one behind the last "Output:". An example is shown only while all of the prompt fits, and none
after one that does not; a prompt that is too long without any is cut to its first tokens (arXiv:2204.07705, the
collator of its released code).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from string import punctuation
from typing import Any

from eval.data.fields import objects, text_of
from eval.data.records import Record, kind
from eval.room import Room


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What a prompt shows of a task; by default what Tk-Instruct is trained with. The names are its flags."""

    add_task_name: bool = False
    add_task_definition: bool = True
    num_pos_examples: int = 2
    num_neg_examples: int = 0
    add_explanation: bool = False
    """Say why each example's output is right, or wrong, where the task has that."""


def task_prompt(task: Record, given: str, encoding: Encoding = Encoding(), room: Room | None = None) -> str:
    """The prompt for one input of a task, with as many examples as there is room for; without a `room`, with all.

    A task has the keys of its file: "Definition", "Positive Examples", "Negative Examples", and "Task" for its name.
    What is missing of those that are shown is a ValueError.
    """
    name = f"{text_of(task, 'Task')}. " if encoding.add_task_name else ""
    opening = ended(f"Definition: {definition(task).strip()}") + "\n\n" if encoding.add_task_definition else ""
    asked = ended(f"Now complete the following example -\nInput: {given.strip()}") + "\nOutput: "

    # What is counted is not quite what is shown: the reference joins examples with a space, and leaves out the name.
    def fits(examples: str) -> bool:
        return room is None or room.holds(opening + examples + asked)

    positive: list[str] = []
    for example in solved(task, "Positive", encoding.num_pos_examples, encoding.add_explanation):
        if not fits(" ".join(positive) + example):
            break
        positive.append(example)
    negative: list[str] = []
    for example in solved(task, "Negative", encoding.num_neg_examples, encoding.add_explanation):
        if not fits(" ".join(positive) + " ".join(negative) + example):
            break
        negative.append(example)
    source = name + opening + "".join(positive) + "".join(negative) + asked
    return source if room is None else room.cut(source)


def solved(task: Record, sort: str, count: int, explained: bool) -> Iterator[str]:
    """The first examples of a task, as they are shown; it may have fewer, or none."""
    key = f"{sort} Examples"
    examples = objects(task, key)[:count] if count and task.get(key) else []
    for number, example in enumerate(examples, 1):
        try:
            given, output = text_of(example, "input", blank=True), first_output(example)
            why = text_of(example, "explanation", optional=True) if explained else ""
        except ValueError as error:
            raise ValueError(f"{key}: number {number}: {error}") from None
        text = ended(f" {sort} Example {number} -\nInput: {given.strip()}") + "\n"
        text += ended(f" Output: {output.strip()}") + "\n"
        if explained and "explanation" in example:
            text += ended(f" Explanation: {why.strip()}") + "\n"
        yield text + "\n"


def ended(text: str) -> str:
    """A text with a full stop, unless it ends with punctuation.

    >>> ended("Of coal"), ended("Of grass?")
    ('Of coal.', 'Of grass?')
    """
    return text if text[-1] in punctuation else f"{text}."


def definition(task: Record) -> str:
    """What the task is; of a list, the first."""
    given = task.get("Definition")
    if isinstance(given, list) and given:
        given = given[0]
    if not isinstance(given, str) or not given.strip():
        raise ValueError(f"Definition is {kind(given) if given else 'empty'}; text is needed, or a list of it")
    return given


def outputs(instance: Record) -> list[str]:
    """All outputs of an instance, each as good as the others; numbers, which some tasks have, as texts.

    >>> outputs({"output": ["yes", 1]}), outputs({"output": "no"}), outputs({"output": []})
    (['yes', '1'], ['no'], [])
    """
    value = instance.get("output")
    return [as_text(it) for it in value if it is not None] if isinstance(value, list) else [as_text(value)]


def first_output(example: Record) -> str:
    """The first output that is not empty."""
    given = outputs(example)
    return text_of({"output": next((it for it in given if it), "")}, "output")


def as_text(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return text_of({"output": value}, "output", blank=True)
