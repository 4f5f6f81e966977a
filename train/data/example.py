"""One thing to learn, in the form that every layout of records is read into.

A record becomes a conversation, and has a plain form too where its layout joins a prompt and a response as
text; a text to classify also keeps its texts and its label. The functions that make an example refuse what
nothing can be learned from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from eval.room import Room

Message = dict[str, str]
Kind = Literal["text", "classification", "regression"]


class PassedOver(ValueError):
    """Why an example is left out rather than refused: the published data sets are known to have such ones."""


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
    fit: Callable[[Room], str] | None = None
    """Writes the prompt for a number of tokens, where the layout has its own rule for what to leave out of it."""
    others: tuple[str, ...] = ()
    """Other responses that are as good; which one is learned is drawn."""
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


def exchange(asked: str, answered: str, prompt: str, response: str) -> Example:
    """One question and its answer, as messages and as plain text."""
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    return Example(messages, prompt, response)


def conversation(key: str, messages: list[Message], last_only: bool = False) -> Example:
    """An example of which every answer is learned, or the last; and so none may be empty."""
    answers = [(n, m) for n, m in enumerate(messages, 1) if m["role"] == "assistant"]
    if not answers:
        raise ValueError(f"{key} has no response by the assistant; there is nothing to learn from it")
    for number, message in answers:
        if not message["content"].strip():
            raise ValueError(f"{key}: the response in turn {number} is empty; write one or remove the record")
    return Example(tuple(messages), last_only=last_only)


def joined(prompt: str, response: str) -> str:
    """A response as it follows a prompt: behind a space, if neither brings white space."""
    apart = not prompt or prompt[-1].isspace() or response[:1].isspace()
    return response if apart else f" {response}"
