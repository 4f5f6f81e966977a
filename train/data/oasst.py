"""OASST1's messages: of every tree of replies, the conversation that people ranked highest.

As the paper trains on it: from the opening question on, the top-ranked reply at each level. A file has the
messages as rows in any order, or whole trees, each with its replies inside. Messages that were deleted or did
not pass review are passed over, and with them what was said in reply.
"""

from dataclasses import dataclass, field
from typing import Any

from eval.data.fields import objects, text_of
from eval.data.records import Record, kind
from train.data.example import Example, Message, PassedOver, conversation

ROLES = {"prompter": "user", "assistant": "assistant"}


def role(record: Record) -> str:
    given = record.get("role")
    if not isinstance(given, str) or given not in ROLES:
        raise ValueError(f"role is {given!r:.80}; known are {', '.join(ROLES)}")
    return ROLES[given]


def usable(record: Record) -> bool:
    """Whether a message is neither deleted nor rejected; one that nobody reviewed is not usable either."""
    reviewed = record.get("review_result", True)
    if reviewed is None:
        reviewed = record.get("review_count") != 0
    return not record.get("deleted") and bool(reviewed)


def rank(record: Record) -> float:
    """Place among its siblings, 0 for the best; those without one come last."""
    given = record.get("rank")
    if given is None:
        return float("inf")
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise ValueError(f"rank is {kind(given)}; a number or null is needed")
    return given


def message(record: Record) -> Message:
    return {"role": role(record), "content": text_of(record, "text")}


def is_tree(record: Record) -> bool:
    """Whether a record is a whole tree."""
    return isinstance(record["prompt"], dict) and "replies" in record["prompt"]


def read_tree(record: Record) -> Example:
    """A tree with its replies inside."""
    node: Any = record["prompt"]
    if not isinstance(node, dict):
        raise ValueError(f"prompt is {kind(node)}; a message with its replies is needed")
    if not usable(node):
        raise PassedOver("trees whose question was deleted or did not pass review")
    messages = []
    while node is not None:
        messages.append(message(node))
        replies = [r for r in objects(node, "replies") if usable(r)] if node.get("replies") else []
        replies.sort(key=lambda reply: (rank(reply), not reply.get("replies")))
        node = replies[0] if replies else None
    return answered("prompt", messages)


def read_thread(records: list[Record]) -> Example:
    """A conversation of rows, in order."""
    return answered("text", [message(record) for record in records])


def answered(key: str, messages: list[Message]) -> Example:
    """A conversation without the question at its end that nobody answered."""
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return conversation(key, messages)


@dataclass
class Forest:
    """The rows of a file as trees; of each row no more is kept than its place, its parent and its rank."""

    numbers: dict[str, int] = field(default_factory=dict)
    """Every row's number by its message_id."""
    children: dict[str, list[tuple[float, int, str]]] = field(default_factory=dict)
    """Rank, number and id of the usable replies to a message."""
    roots: list[str] = field(default_factory=list)
    answers: set[int] = field(default_factory=set)

    def add(self, number: int, record: Record) -> None:
        """Take up a row; one that cannot be a message is refused."""
        id, parent = text_of(record, "message_id"), record.get("parent_id")
        if id in self.numbers:
            raise ValueError(f"message_id {id!r:.80} is there twice")
        if parent is not None and not isinstance(parent, str):
            raise ValueError(f"parent_id is {kind(parent)}; text or null is needed")
        self.numbers[id] = number
        if not usable(record):
            raise PassedOver("messages that were deleted or did not pass review")
        made, place = message(record), rank(record)
        if made["role"] == "assistant":
            self.answers.add(number)
        if not parent:
            self.roots.append(id)
        else:
            self.children.setdefault(parent, []).append((place, number, id))

    def orphans(self) -> list[int]:
        """The replies whose message is not in the file; what was said in answer to them is lost with them."""
        replies = [reply for parent, found in self.children.items() if parent not in self.numbers for reply in found]
        return sorted(number for _, number, _ in replies)

    def threads(self) -> dict[int, list[int]]:
        """By the row of each question, the rows of its conversation up to the last answer; none if there is none."""
        found = {}
        for root in self.roots:
            thread, id = [self.numbers[root]], root
            while id in self.children:
                _, _, number, id = min((r, i not in self.children, n, i) for r, n, i in self.children[id])
                thread.append(number)
            while thread and thread[-1] not in self.answers:
                thread.pop()
            found[self.numbers[root]] = thread
        return found
