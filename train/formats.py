"""Instruction data as people have it: files of records in one of several layouts, read into one form.

Every record becomes a conversation; layouts that join a prompt and a response as plain text keep that form
too. The layout is found from the keys of the first record, unless it is named. What does not fit is
refused with file and line, the first few together: a dataset that is silently half empty costs a run.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.errors import ConfigError, DataError

Message = dict[str, str]
Record = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One thing to learn: a conversation, and its plain form where the layout has one."""

    messages: tuple[Message, ...]
    """Turns in order, each with a role (system, user, assistant) and content."""
    prompt: str | None = None
    """The plain text before the response."""
    response: str | None = None
    """The plain text to learn."""
    last_only: bool = False
    """Of a conversation, learn only the last answer: the ones before are context."""
    where: str = ""
    """File and line, for messages."""


@dataclass(frozen=True)
class Format:
    """A layout: the keys that tell it, what it looks like, and how a record becomes an Example."""

    keys: frozenset[str]
    shape: str
    read: Callable[[Record], Example]


def read_examples(path: str | Path, format: str | None = None) -> tuple[list[Example], str]:
    """All examples of a file (JSON, JSONL, CSV or TSV), and the name of their layout."""
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise ConfigError(f"data: format {format!r} is not known; give one of {', '.join(FORMATS)}")
    examples, problems = [], []
    for where, record in records(path):
        if isinstance(record, str):
            problems.append(f"{where}: {record}")
            continue
        try:
            if format is None:
                format = detect(record)
            row = FORMATS[format]
            lacking = sorted(row.keys - record.keys())
            if lacking:
                raise ValueError(f"lacks {', '.join(lacking)}, which {format} records have ({row.shape})")
            examples.append(replace(row.read(record), where=where))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        listed = "\n  ".join(problems[:5]) + more
        raise DataError(listed if len(problems) == 1 else f"data: {len(problems)} bad records\n  {listed}")
    if not examples or format is None:
        raise DataError(f"{path}: is empty; at least one record is needed")
    return examples, format


def detect(record: Record) -> str:
    """The layout whose keys a record has."""
    for name, row in FORMATS.items():
        if row.keys <= record.keys():
            return name
    shapes = "; ".join(f"{name}: {row.shape}" for name, row in FORMATS.items())
    found = ", ".join(map(str, record)) or "no key"
    raise ValueError(f"found {found}, which is no known layout. Known are {shapes}. Rename the keys")


# Files to records


def records(path: Path) -> Iterator[tuple[str, Record | str]]:
    """Every record with its place in the file; in place of one that cannot be read, the reason."""
    text = decoded(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
        table = csv.DictReader(io.StringIO(text, newline=""), dialect=dialect)
        for row in table:
            extra = None in row or None in row.values()
            yield f"{path}:{table.line_num}", "has another number of fields than the header" if extra else row
    elif text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); the file may be cut off") from error
        for number, item in enumerate(items, 1):
            yield f"{path}: record {number}", item if isinstance(item, dict) else not_an_object(item)
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}:{number}", parsed(line)


def decoded(path: Path) -> str:
    """A file's text, a byte-order mark aside; bytes that are not UTF-8 are refused with their line."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: is not UTF-8 text; convert the file, for example with iconv") from error
    return text.replace("\r\n", "\n")


def parsed(line: str) -> Record | str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error}); one record a line is expected, and the last may be cut off"
    return value if isinstance(value, dict) else not_an_object(value)


def not_an_object(value: Any) -> str:
    return f"is a {type(value).__name__}; a record is an object with named fields"


# Layouts


def text_of(record: Record, key: str, needed: bool = True) -> str:
    """A field's text; null and absent are empty, which only an optional field may be."""
    value = record.get(key)
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise ValueError(f"{key} is a {type(value).__name__}; text is needed")
    if needed and not value.strip():
        raise ValueError(f"{key} is empty; there is nothing to learn from this record")
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
    instruction, given = text_of(record, "instruction"), text_of(record, "input", needed=False)
    output = text_of(record, "output")
    if given.strip():
        prompt = ALPACA_INPUT.format(instruction=instruction, input=given)
        asked = f"{instruction}\n\n{given}"
    else:
        prompt, asked = ALPACA.format(instruction=instruction), instruction
    return exchange(asked, output, prompt, "\n" + output)


def pair(prompt_key: str, response_key: str) -> Callable[[Record], Example]:
    """Prompt and response as they are, with a space between if neither brings one.

    A prompt in Guanaco's form, as in OASST1's question files, is also a conversation with its history.
    """

    def read(record: Record) -> Example:
        prompt, response = text_of(record, prompt_key), text_of(record, response_key)
        joined = response if prompt[-1:].isspace() or response[:1].isspace() else f" {response}"
        if "### Human:" not in prompt:
            return exchange(prompt.strip(), response.strip(), prompt, joined)
        history = turns(prompt.rstrip().removesuffix("### Assistant:"))
        messages = (*history, {"role": "assistant", "content": response.strip()})
        return Example(messages, prompt, joined, last_only=True)

    return read


def read_guanaco(record: Record) -> Example:
    """`### Human: ...### Assistant: ...`, for as many turns as there are; every answer is learned."""
    return conversation(turns(text_of(record, "text")))


def turns(text: str) -> list[Message]:
    """The messages of a text in Guanaco's form."""
    start, *parts = text.split("### ")
    messages = [{"role": "system", "content": start.strip()}] if start.strip() else []
    for part in parts:
        name, colon, content = part.partition(":")
        if colon and name in GUANACO_ROLES:
            messages.append({"role": GUANACO_ROLES[name], "content": content})
        elif messages:
            messages[-1]["content"] += f"### {part}"  # a heading inside a message
        else:
            raise ValueError("the text does not begin with '### Human:'")
    return [{**message, "content": message["content"].strip()} for message in messages]


def read_messages(record: Record) -> Example:
    """Chat messages: {"role", "content"}, or ShareGPT's {"from", "value"}."""
    key = "messages" if "messages" in record else "conversations"
    given = record[key]
    if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given):
        raise ValueError(f"{key} is not a list of turns")
    messages = []
    for number, turn in enumerate(given, 1):
        role = turn.get("role", turn.get("from"))
        if role not in CHAT_ROLES:
            raise ValueError(f"{key}: turn {number} is by {role!r}; known are {', '.join(CHAT_ROLES)}")
        content = text_of(turn, "content" if "content" in turn else "value")
        messages.append({"role": CHAT_ROLES[role], "content": content})
    return conversation(messages)


GUANACO_ROLES = {"Human": "user", "Assistant": "assistant"}
CHAT_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}

FORMATS = {
    "chat": Format(frozenset({"messages"}), '{"messages": [{"role", "content"}]}', read_messages),
    "sharegpt": Format(frozenset({"conversations"}), '{"conversations": [{"from", "value"}]}', read_messages),
    "alpaca": Format(frozenset({"instruction", "output"}), '{"instruction", "input", "output"}', read_alpaca),
    "prompt-completion": Format(
        frozenset({"prompt", "completion"}), '{"prompt", "completion"}', pair("prompt", "completion")
    ),
    "input-output": Format(frozenset({"input", "output"}), '{"input", "output"}', pair("input", "output")),
    "inputs-targets": Format(frozenset({"inputs", "targets"}), '{"inputs", "targets"}', pair("inputs", "targets")),
    "guanaco": Format(frozenset({"text"}), '{"text": "### Human: ...### Assistant: ..."}', read_guanaco),
}


def exchange(asked: str, answered: str, prompt: str, response: str) -> Example:
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    return Example(messages, prompt, response)


def conversation(messages: list[Message]) -> Example:
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise ValueError("has no response by the assistant; there is nothing to learn from this record")
    return Example(tuple(messages))
