"""What a judge is: a model that is asked prompts, and whose replies come when they come."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Prompt:
    """What a judge is asked: a system message and the user's."""

    system: str
    user: str


@dataclass(frozen=True)
class Reply:
    """What a judge said, word for word."""

    text: str
    details: dict[str, Any] = field(default_factory=dict)
    """What else is known of it, as JSON values: tokens used, why it ended."""


@runtime_checkable
class Judge(Protocol):
    """Whoever can be asked."""

    name: str
    """As files of ratings name it."""
    settings: dict[str, Any]
    """What decides its replies, as JSON values."""

    def replies(self, prompts: Mapping[str, Prompt]) -> Iterator[tuple[str, Reply]]:
        """Each reply under its prompt's key, in the order in which they come."""
        ...

    def tokens(self, prompt: Prompt) -> int:
        """Tokens of a prompt, or an estimate."""
        ...
