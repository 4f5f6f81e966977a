"""Instruction data as people have it: records in one of several layouts, read into one form.

Every record becomes a conversation; layouts that join a prompt and a response as plain text keep that form
too. The layout is found from the keys of the first record, unless it is named, and the others must have it
as well. What does not fit is refused with file and line, the first few together: a dataset that is silently
half empty costs a run.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from models.errors import ConfigError, DataError
from train.data.records import Record, kind, records

Message = dict[str, str]

SHOWN = 5  # problems that a refusal lists; it gives the number of the others


@dataclass(frozen=True)
class Example:
    """One thing to learn: a conversation, and its plain form where the layout has one."""

    messages: tuple[Message, ...] = ()
    """Turns in order, each with a role (system, user, assistant) and content."""
    prompt: str | None = None
    """The plain text before the response."""
    response: str | None = None
    """The plain text to learn."""
    last_only: bool = False
    """Of a conversation, learn only the last answer: the ones before are context."""
    texts: tuple[str, ...] = ()
    """One text or two, to be given a label."""
    label: int | float | None = None
    """The number of their class, or a number itself."""
    where: str = ""
    """File and line, for messages."""

    @property
    def opening(self) -> str:
        """What the conversation begins with, up to its first answer."""
        asked = [m["content"] for m in self.messages[: self.first_answer]] if self.messages else self.texts
        return "\n".join(asked)

    @property
    def first_answer(self) -> int:
        return [m["role"] for m in self.messages].index("assistant")


@dataclass(frozen=True)
class Format:
    """A layout: the keys that tell it, and how a record that has them becomes an Example."""

    keys: tuple[tuple[str, ...], ...]
    """Sets of keys; a record has this layout if it has all of one of them."""
    read: Callable[[Record], Example]
    shape: str
    """What a record looks like, for people."""


def read_examples(path: str | Path, format: str | None = None) -> tuple[list[Example], str]:
    """All examples of a file (JSON, JSONL, CSV or TSV), and the name of their layout."""
    path = Path(path)
    if format is not None and format not in FORMATS:
        near = get_close_matches(format, FORMATS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"data: format {format!r} is not known; give one of {', '.join(FORMATS)}.{hint}")
    examples, problems, total = [], [], 0
    for where, record in records(path):
        total += 1
        try:
            if isinstance(record, str):
                raise ValueError(record)
            if format is None:
                format = detect(record)
            elif not fits(record, FORMATS[format]):
                raise ValueError(misfit(record, [format]))
            examples.append(replace(FORMATS[format].read(record), where=where))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if len(problems) == 1:
        raise DataError(f"data: {problems[0]}")
    if problems:
        first = "".join(f"\n  {problem}" for problem in problems[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError(f"data: {len(problems)} of {total} records in {path} cannot be used:{first}{more}")
    if not examples or format is None:
        raise DataError(f"data: {path} is empty; at least one record is needed")
    return examples, format


def detect(record: Record) -> str:
    """The layout whose keys a record has."""
    for name, layout in FORMATS.items():
        if fits(record, layout):
            return name
    raise ValueError(misfit(record, list(FORMATS)))


def fits(record: Record, layout: Format) -> bool:
    return any(set(keys) <= record.keys() for keys in layout.keys)


def misfit(record: Record, names: list[str]) -> str:
    known = [f"{'+'.join(keys)} ({name})" for name in names for keys in FORMATS[name].keys]
    found = [key if len(key) <= 40 else f"{key[:37]}..." for key in record]
    listed = ", ".join(found[:10]) + (", ..." if len(found) > 10 else "")
    return f"expected keys {' or '.join(known)}; found {listed or 'none'}. Rename the keys in the file"


def text_of(record: Record, key: str, *, optional: bool = False, blank: bool = False) -> str:
    """A field's text; it may be absent or null only where it is optional, and blank only where that is allowed."""
    value = record.get(key)
    if value is None and optional:
        return ""
    if key not in record:
        raise ValueError(f"{key} is missing")
    if not isinstance(value, str):
        raise ValueError(f"{key} is {kind(value)}; text is needed")
    if not (value.strip() or blank or optional):
        raise ValueError(f"{key} is empty; write one or remove the record")
    return value


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


PAIRS = (("prompt", "completion"), ("input", "output"), ("inputs", "targets"), ("source", "target"))


def read_pair(record: Record) -> Example:
    """Prompt and response as they are, with a space between if neither brings one; the prompt may be empty.

    A prompt in Guanaco's form, as in OASST1's question files, is also a conversation with its history.
    """
    prompt_key, response_key = next(keys for keys in PAIRS if set(keys) <= record.keys())
    prompt, response = text_of(record, prompt_key, blank=True), text_of(record, response_key)
    apart = not prompt or prompt[-1].isspace() or response[0].isspace()
    joined = response if apart else f" {response}"
    if "### Human:" in prompt and prompt.rstrip().endswith("### Assistant:"):
        history = turns(prompt.rstrip().removesuffix("### Assistant:"))
        messages = (*history, {"role": "assistant", "content": response.strip()})
        return Example(messages, prompt, joined, last_only=True)
    return exchange(prompt.strip(), response.strip(), prompt, joined)


def read_guanaco(record: Record) -> Example:
    """`### Human: ...### Assistant: ...`, for as many turns as there are; every answer is learned."""
    return conversation("text", turns(text_of(record, "text")))


GUANACO_ROLES = {"Human": "user", "Assistant": "assistant"}


def turns(text: str) -> list[Message]:
    """The messages of a text in Guanaco's form; what stands before the first mark is the system's."""
    start, *rest = re.split(r"### (Human|Assistant):", text)
    if not rest:
        raise ValueError("text has no '### Human:' and '### Assistant:', which the guanaco format needs")
    messages = [{"role": "system", "content": start.strip()}] if start.strip() else []
    for name, content in zip(rest[::2], rest[1::2], strict=True):
        messages.append({"role": GUANACO_ROLES[name], "content": content.strip()})
    return messages


CHAT_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def read_chat(record: Record) -> Example:
    """Chat messages: {"role", "content"}, or ShareGPT's {"from", "value"}; every answer is learned."""
    key = "messages" if "messages" in record else "conversations"
    given = record[key]
    if not isinstance(given, list):
        raise ValueError(f"{key} is {kind(given)}; a list of turns is needed")
    messages = []
    for number, turn in enumerate(given, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"{key}: turn {number} is {kind(turn)}, not an object")
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in CHAT_ROLES:
            raise ValueError(f"{key}: turn {number} is by {role!r}; known are {', '.join(CHAT_ROLES)}")
        try:
            key_of_text = "value" if "value" in turn and "content" not in turn else "content"
            content = text_of(turn, key_of_text, blank=True)
        except ValueError as error:
            raise ValueError(f"{key}: turn {number}: {error}") from None
        messages.append({"role": CHAT_ROLES[role], "content": content})
    return conversation(key, messages)


# A new layout is a reader and a row. The first row that fits decides, so the more telling keys come first.
FORMATS = {
    "chat": Format((("messages",), ("conversations",)), read_chat, '{"messages": [{"role", "content"}, ...]}'),
    "alpaca": Format((("instruction", "output"),), read_alpaca, '{"instruction", "input", "output"}'),
    "prompt-completion": Format(PAIRS, read_pair, '{"prompt", "completion"}'),
    "guanaco": Format((("text",),), read_guanaco, '{"text": "### Human: ...### Assistant: ..."}'),
}


def exchange(asked: str, answered: str, prompt: str, response: str) -> Example:
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    return Example(messages, prompt, response)


def conversation(key: str, messages: list[Message]) -> Example:
    """An example of which every answer is learned, and so none may be empty."""
    answers = [(n, m) for n, m in enumerate(messages, 1) if m["role"] == "assistant"]
    if not answers:
        raise ValueError(f"{key} has no response by the assistant; there is nothing to learn from it")
    for number, message in answers:
        if not message["content"].strip():
            raise ValueError(f"{key}: the response in turn {number} is empty; write one or remove the record")
    return Example(tuple(messages))
