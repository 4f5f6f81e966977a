"""Layouts that say what to do and what came of it: Alpaca and its kin, and plain pairs of texts."""

from eval.data.fields import objects, text_of
from eval.data.records import Record
from train.data.chat_formats import turns
from train.data.example import Example, exchange, joined

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def read_alpaca(record: Record) -> Example:
    """Instruction, perhaps an input, output; the prompt is the one that Alpaca was trained with."""
    instruction, given = text_of(record, "instruction"), text_of(record, "input", optional=True)
    output = text_of(record, "output")
    if given.strip():
        prompt = ALPACA_INPUT.format(instruction=instruction, input=given)
        asked = f"{instruction}\n\n{given}"
    else:
        prompt, asked = ALPACA.format(instruction=instruction), instruction
    return exchange(asked, output, prompt, "\n" + output)


def read_dolly(record: Record) -> Example:
    """Dolly's names for the same: context is the input, response the output."""
    context, response = text_of(record, "context", optional=True), text_of(record, "response")
    return read_alpaca({"instruction": record["instruction"], "input": context, "output": response})


PAIRS = (("prompt", "completion"), ("input", "output"), ("inputs", "targets"), ("source", "target"))


def read_pair(record: Record) -> Example:
    """Prompt and response as they are, with a space between if neither brings one; the prompt may be empty.

    A prompt in Guanaco's form, as in OASST1's question files, is also a conversation with its history.
    """
    prompt_key, response_key = next(keys for keys in PAIRS if set(keys) <= record.keys())
    prompt, response = text_of(record, prompt_key, blank=True), text_of(record, response_key)
    answered = joined(prompt, response)
    if "### Human:" in prompt and prompt.rstrip().endswith("### Assistant:"):
        history = turns(prompt.rstrip().removesuffix("### Assistant:"))
        messages = (*history, {"role": "assistant", "content": response.strip()})
        return Example(messages, prompt, answered, last_only=True)
    return exchange(prompt.strip(), response.strip(), prompt, answered)


def split_self_instruct(record: Record) -> list[Record]:
    """An instruction with instances, one record for each; pairs, its other form, stay as they are."""
    if "instances" not in record:
        return [record]
    return [{**instance, "instruction": record.get("instruction")} for instance in objects(record, "instances")]


def read_self_instruct(record: Record) -> Example:
    """One instance of an instruction, or a pair of prompt and completion."""
    return read_alpaca(record) if "instruction" in record else read_pair(record)


def is_unnatural(record: Record) -> bool:
    """Whether the instances are those of Unnatural Instructions."""
    instances = record["instances"]
    return isinstance(instances, list) and any("instruction_with_input" in i for i in instances if isinstance(i, dict))


def split_unnatural(record: Record) -> list[Record]:
    """Unnatural Instructions' core: one record for each instance."""
    return objects(record, "instances")


def read_unnatural(record: Record) -> Example:
    """The instruction with its input, the constraints below it where there are any; the output on the next line."""
    prompt, output = text_of(record, "instruction_with_input"), text_of(record, "output")
    constraints = text_of(record, "constraints", optional=True).strip()
    if constraints.rstrip(".").lower() not in ("", "none") and constraints not in prompt:
        prompt = f"{prompt}\n{constraints}"
    return exchange(prompt, output, prompt, "\n" + output)
