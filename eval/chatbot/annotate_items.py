"""What human raters compare: a question with the answers of two systems, and which of them stands on which side.

The side is drawn for each rater and comparison. What the page calls a comparison is a keyed hash, which tells neither
the systems nor their order.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from itertools import combinations

from eval.chatbot.answers import Answers
from eval.chatbot.questions import Question
from models import ConfigError, DataError

Key = tuple[str, str, str]  # question id and two systems, the lesser name first


@dataclass(frozen=True)
class Comparison:
    """One question and what two systems answered."""

    question: Question
    systems: tuple[str, str]
    """In the order of their names."""
    answers: tuple[str, str]

    @property
    def key(self) -> Key:
        return (self.question.id, *self.systems)

    @property
    def flipped(self) -> "Comparison":
        """The same with the sides exchanged."""
        return Comparison(self.question, self.systems[::-1], self.answers[::-1])

    def shown(self, rater: str, seed: int) -> "Comparison":
        """As this rater sees it: the first system is A."""
        return self.flipped if draw(seed, "side", rater, *self.key) & 1 else self

    def token(self, rater: str, secret: bytes) -> str:
        """What the page calls it, as it is shown to this rater."""
        named = json.dumps([rater, self.question.id, *self.systems])
        return blake2b(named.encode(), key=secret, digest_size=16).hexdigest()


def comparisons(
    questions: Sequence[Question], systems: Sequence[Answers], reference: str | None = None
) -> list[Comparison]:
    """Every pair of systems, or every system with the reference, on each question that both answered."""
    if len(systems) < 2:
        raise ConfigError(f"raters compare two systems or more; {len(systems) or 'no'} file of answers was given")
    by_name = {answers.system: answers for answers in systems}
    if reference is not None and reference not in by_name:
        raise ConfigError(f"the reference {reference} is none of the systems given: {', '.join(by_name)}")
    found = []
    for first, second in combinations(sorted(by_name), 2):
        if reference is not None and reference not in (first, second):
            continue
        one, other = by_name[first].texts, by_name[second].texts
        both = [it for it in questions if it.id in one and it.id in other]
        if not both:
            raise DataError(
                f"{by_name[first].path} and {by_name[second].path} have no answer to a common question of the "
                "questions given; do all three belong together?"
            )
        found += [Comparison(it, (first, second), (one[it.id], other[it.id])) for it in both]
    return found


def fingerprint(question: str, answer: str) -> str:
    """What tells whether a vote was on these very texts."""
    return sha256(json.dumps([question, answer]).encode()).hexdigest()


def draw(seed: int, *what: str) -> int:
    """A random number that is always the same for the same things."""
    return int.from_bytes(sha256(json.dumps([seed, *what]).encode()).digest()[:8])
