"""The questions that chatbots are asked: a file of the Vicuna or the OpenAssistant benchmark, or of one's own.

A Vicuna question is one message. An OpenAssistant question may be the last of a dialogue, which its text holds with
marks:

    ### Human: How do I build a PC? ### Assistant: In six steps. ### Human: And how do I cool it? ### Assistant:

A judge is shown the text as it is; a model is asked either the messages in its own chat form, or the prompt that the
paper's models were asked with: the text behind a preamble.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.data.records import Record, RecordFile, kind
from models import DataError

PREAMBLE = (  # of the released prompts; models were trained without it
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
KEYS = ("message_id", "question_id", "id")  # OpenAssistant's rows have two of them, and are named by the first
TEXTS = ("text", "question", "input", "prompt")
MARK = re.compile(r"\s*### (Human|Assistant):\s?")
ROLES = {"Human": "user", "Assistant": "assistant"}
CATEGORY = "generic"


@dataclass(frozen=True)
class Question:
    """What is asked, under the id by which answers and ratings name it."""

    id: str
    text: str
    """As a judge is shown it."""
    category: str = CATEGORY
    key: str = "question_id"
    """What files call the id."""

    @property
    def named(self) -> dict[str, int | str]:
        """The id as rows of files have it: a number where it is one."""
        number = self.id.isascii() and self.id.isdecimal() and str(int(self.id)) == self.id
        return {self.key: int(self.id) if number else self.id}

    @property
    def is_dialogue(self) -> bool:
        """Whether the text has marks."""
        return self.text.lstrip().startswith("### Human:")

    @property
    def dialogue(self) -> str:
        """The question with its marks, up to where the answer begins."""
        return self.text if self.is_dialogue else f"### Human: {self.text} ### Assistant:"

    @property
    def prompt(self) -> str:
        """What the paper's models were asked to go on from."""
        return f"{PREAMBLE} {self.dialogue}"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The question as a chat: of a dialogue all turns, else one message from the user."""
        if not self.is_dialogue:
            return [{"role": "user", "content": self.text}]
        _, *parts = MARK.split(self.text)  # role, content, role, content, ...
        turns = [{"role": ROLES[role], "content": text} for role, text in zip(parts[::2], parts[1::2], strict=True)]
        return turns[:-1] if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip() else turns


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file, in its order; one without an id or a text, or an id that comes twice, is refused."""
    questions: dict[str, Question] = {}
    for where, row in records(Path(path)):
        key, id = identifier(row, where)
        if id in questions:
            raise DataError(f"{where}: the {key} {id} comes twice; each question needs an id of its own")
        category = row.get("category", CATEGORY)
        if not isinstance(category, str):
            raise DataError(f"{where}: the category is {kind(category)}; a text is needed")
        questions[id] = Question(
            id, asked(row, where), category, "message_id" if key == "message_id" else "question_id"
        )
    if not questions:
        raise DataError(f"{path}: holds no question")
    return list(questions.values())


def records(path: Path) -> Iterator[tuple[str, Record]]:
    """Every record of a file and where it is; one that cannot be read is refused."""
    file = RecordFile(path)
    for number, row in enumerate(file.scan()):
        if isinstance(row, ValueError):
            raise DataError(f"{file.where(number)}: {row}")
        yield file.where(number), row


def identifier(row: Record, where: str) -> tuple[str, str]:
    """What a row calls its question's id, and the id; numbers and texts are the same."""
    for key in KEYS:
        id = row.get(key)
        if isinstance(id, int | str) and not isinstance(id, bool) and str(id).strip():
            return key, str(id)
    raise DataError(f"{where}: names no question: {', '.join(KEYS[:2])} or {KEYS[2]} is needed; it has {listed(row)}")


def asked(row: Record, where: str) -> str:
    """A question's text; a chat of several messages becomes a text with marks."""
    if isinstance(row.get("messages"), list):
        return well_formed(marked(row["messages"], where))
    for name in TEXTS:
        if isinstance(row.get(name), str) and row[name].strip():
            text = well_formed(row[name])
            return text.removeprefix(PREAMBLE).lstrip() if name == "prompt" else text
    raise DataError(f"{where}: has no question: one of {', '.join(TEXTS)} or messages is needed; it has {listed(row)}")


def marked(messages: list[Any], where: str) -> str:
    """A chat's messages as one text.

    >>> marked([{"role": "user", "content": "Hello"}], "here")
    'Hello'
    """
    names = {role: name for name, role in ROLES.items()}
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{where}: a message is not an object with a role and a text as its content")
        if message.get("role") not in names:
            raise DataError(f"{where}: a message has the role {message.get('role')!r}; known are {', '.join(names)}")
    if not messages or messages[-1]["role"] != "user":
        raise DataError(f"{where}: the messages do not end with one from the user; nothing is asked")
    if len(messages) == 1:
        return messages[0]["content"]
    turns = [f"### {names[message['role']]}: {message['content']}" for message in messages]
    return " ".join([*turns, "### Assistant:"])


def well_formed(text: str) -> str:
    """A text whose halves of surrogate pairs, which JSON can hold and UTF-8 cannot, are U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def listed(row: Record) -> str:
    return ", ".join(map(str, row)) or "nothing"
