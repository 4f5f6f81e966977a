"""Super-NaturalInstructions: a task's definition, two solved examples, and the instance to solve.

The prompt is Tk-Instruct's, byte for byte, in the setting of its training script; `eval/superni/prompt.py` writes it,
with as many examples as there is room for. Of several outputs one is drawn; an instance without any is passed over.
"""

from dataclasses import replace
from functools import partial

from eval.data.fields import objects, text_of
from eval.data.json_records import ITEMS
from eval.data.records import Record
from eval.superni.prompt import Encoding, outputs, task_prompt
from train.data.example import Example, PassedOver, exchange, joined


def split_task(record: Record) -> list[Record]:
    """A task as one record for each of its instances."""
    instances = objects(record, ITEMS)
    return [{**record, ITEMS: [instance]} for instance in instances]


def read_task(record: Record) -> Example:
    """The one instance of a task."""
    (instance,) = objects(record, ITEMS)
    given = text_of(instance, "input", blank=True)
    prompt = task_prompt(record, given)
    answer, *others = [it for it in outputs(instance) if it.strip()] or [""]
    if not answer:
        raise PassedOver("instances without an output")
    made = exchange(prompt.strip(), answer.strip(), prompt, joined(prompt, answer))
    return replace(made, fit=partial(task_prompt, record, given, Encoding()), others=tuple(others))
