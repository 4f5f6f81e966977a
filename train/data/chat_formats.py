"""Layouts of conversations: lists of messages, and texts whose turns are marked.

Every answer is learned, save in HH-RLHF, where the two texts differ in the last answer alone and only that one
was chosen.
"""

import re

from eval.data.fields import text_of
from eval.data.records import Record, kind
from train.data.example import Example, Message, PassedOver, conversation, exchange

CHAT_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def read_chat(record: Record) -> Example:
    """Chat messages: {"role", "content"}, or ShareGPT's {"from", "value"}."""
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
            raise ValueError(f"{key}: turn {number} is by {role!r:.80}; known are {', '.join(CHAT_ROLES)}")
        try:
            key_of_text = "value" if "value" in turn and "content" not in turn else "content"
            content = text_of(turn, key_of_text, blank=True)
        except ValueError as error:
            raise ValueError(f"{key}: turn {number}: {error}") from None
        messages.append({"role": CHAT_ROLES[role], "content": content})
    return conversation(key, messages)


GUANACO = re.compile(r"### (Human|Assistant):")
CHIP2 = re.compile(r"(?:^|\n)<(human|bot)>:")
HH = re.compile(r"\n\n(Human|Assistant):")
MARKED_ROLES = {"Human": "user", "Assistant": "assistant", "human": "user", "bot": "assistant"}


def read_guanaco(record: Record) -> Example:
    """`### Human: ...### Assistant: ...`, for as many turns as there are."""
    return conversation("text", turns(text_of(record, "text")))


def is_chip2(record: Record) -> bool:
    """Whether a text has Chip2's marks, not Guanaco's."""
    text = record["text"]
    return isinstance(text, str) and not GUANACO.search(text) and bool(CHIP2.search(text))


def is_marked(text: object) -> bool:
    """Whether a text is a conversation by its marks."""
    return isinstance(text, str) and bool(GUANACO.search(text) or CHIP2.search(text))


def read_chip2(record: Record) -> Example:
    """A line that begins with `<human>:`, and one with `<bot>:`; the plain form keeps the marks."""
    text = text_of(record, "text")
    messages = marked(text, CHIP2, "'<human>:' and '<bot>:', which the chip2 format needs")
    example = conversation("text", messages)
    if [m["role"] for m in messages] != ["user", "assistant"]:
        return example
    prompt, _, response = text.strip().partition("<bot>:")
    return exchange(messages[0]["content"], messages[1]["content"], f"{prompt}<bot>:", response)


def read_hh(record: Record) -> Example:
    """HH-RLHF's chosen text: its last answer is learned, what was said before is context."""
    text = text_of(record, "chosen")
    messages = marked(text, HH, "'Human:' and 'Assistant:' after empty lines, which the hh-rlhf format needs", "chosen")
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise PassedOver("chosen texts that do not end with an answer")
    start = [mark.end() for mark in HH.finditer(text)][-1]
    said = tuple(m for m in messages if m["content"])  # a few of the set's earlier answers are empty
    return Example(said, text[:start], text[start:], last_only=True)


def turns(text: str) -> list[Message]:
    """The messages of a text in Guanaco's form; what stands before the first mark is the system's."""
    return marked(text, GUANACO, "'### Human:' and '### Assistant:', which the guanaco format needs")


def marked(text: str, marks: re.Pattern[str], needed: str, key: str = "text") -> list[Message]:
    """The messages of a text, each behind its mark; what stands before the first one is the system's."""
    start, *rest = marks.split(text)
    if not rest:
        raise ValueError(f"{key} has no {needed}")
    messages = [{"role": "system", "content": start.strip()}] if start.strip() else []
    for name, content in zip(rest[::2], rest[1::2], strict=True):
        messages.append({"role": MARKED_ROLES[name], "content": content.strip()})
    return messages
