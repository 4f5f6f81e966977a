"""Super-NaturalInstructions: a task's definition, two solved examples, and the instance to solve.

The prompt is Tk-Instruct's, byte for byte, in the setting of its training script: the definition, two positive
examples, no negative ones, no explanations. Where an instance has several outputs the first is learned; one
without any is passed over.
"""

from string import punctuation
from typing import Any

from eval.data.json_records import ITEMS
from eval.data.records import Record, kind
from train.data.example import Example, PassedOver, exchange, joined, objects, text_of

POSITIVES = "Positive Examples"
SHOTS = 2


def split_task(record: Record) -> list[Record]:
    """A task as one record for each of its instances."""
    instances = objects(record, ITEMS)
    return [{**record, ITEMS: [instance]} for instance in instances]


def read_task(record: Record) -> Example:
    """The one instance of a task."""
    (instance,) = objects(record, ITEMS)
    given = text_of(instance, "input", blank=True)
    prompt = task_prompt(definition(record), positives(record), given)
    outputs = instance.get("output")
    if outputs in ("", [], [""]):
        raise PassedOver("instances without an output")
    answer = output(outputs)
    return exchange(prompt.strip(), answer.strip(), prompt, joined(prompt, answer))


def task_prompt(definition: str, examples: list[tuple[str, str]], given: str) -> str:
    """Tk-Instruct's encoding: each part ends with a full stop, unless it ends with punctuation."""
    text = ended(f"Definition: {definition.strip()}") + "\n\n"
    for number, (asked, answered) in enumerate(examples, 1):
        text += ended(f" Positive Example {number} -\nInput: {asked.strip()}") + "\n"
        text += ended(f" Output: {answered.strip()}") + "\n\n"
    return text + ended(f"Now complete the following example -\nInput: {given.strip()}") + "\nOutput: "


def ended(text: str) -> str:
    return text if text[-1] in punctuation else text + "."


def definition(record: Record) -> str:
    """What the task is; of a list, the first."""
    given = record.get("Definition")
    if isinstance(given, list) and given:
        given = given[0]
    if not isinstance(given, str) or not given.strip():
        raise ValueError(f"Definition is {kind(given) if given else 'empty'}; text is needed, or a list of it")
    return given


def positives(record: Record) -> list[tuple[str, str]]:
    """The first solved examples; a task may have fewer, or none."""
    if not record.get(POSITIVES):
        return []
    found = []
    for number, example in enumerate(objects(record, POSITIVES)[:SHOTS], 1):
        try:
            found.append((text_of(example, "input", blank=True), output(example.get("output"))))
        except ValueError as error:
            raise ValueError(f"{POSITIVES}: number {number}: {error}") from None
    return found


def output(value: Any) -> str:
    """An output, or the first of several that is not empty; some tasks have numbers."""
    outputs = value if isinstance(value, list) and value else [value]
    texts = [str(it) if isinstance(it, (int, float)) and not isinstance(it, bool) else it for it in outputs]
    chosen = next((it for it in texts if it not in ("", None)), texts[0])
    return text_of({"output": chosen}, "output")
