"""Verdicts on pairs of answers, and how several votes on one pair become one verdict."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from eval.chatbot.verdicts import FIRST, SECOND, TIE, UNPARSED


class Verdict(NamedTuple):
    """Which of two answers to a question is better: 1 the one shown first, 2 the other, 3 neither, -1 unparsed."""

    question: str
    first: str
    second: str
    score: int
    rater: str = ""
    """The person who voted; empty for a model."""

    def turned(self) -> "Verdict":
        """The same verdict as if the answers had been shown in the other order."""
        score = {FIRST: SECOND, SECOND: FIRST}.get(self.score, self.score)
        return self._replace(first=self.second, second=self.first, score=score)


def items(verdicts: Sequence[Verdict]) -> list[list[Verdict]]:
    """The votes on each pair of answers, as if all had been shown in one order.

    People's votes belong together in both orders, since each was shown one by chance; they are turned to the order
    that most of them saw. A model was asked in each order for the order's sake, so its verdicts stay apart.
    """
    groups: dict[tuple[str, frozenset[str], str], list[Verdict]] = {}
    for vote in verdicts:
        order = "" if vote.rater else vote.first
        groups.setdefault((vote.question, frozenset((vote.first, vote.second)), order), []).append(vote)
    return [in_one_order(votes) for votes in groups.values()]


def in_one_order(votes: Sequence[Verdict]) -> list[Verdict]:
    """Votes turned to the order that most of them saw; of two, the first vote's."""
    first = Counter(vote.first for vote in votes).most_common(1)[0][0]
    return [vote if vote.first == first else vote.turned() for vote in votes]


def majority(votes: Sequence[Verdict]) -> Verdict:
    """What more than half of an item's parsed votes say; a tie if no such half is, unparsed if none is parsed."""
    parsed = Counter(vote.score for vote in votes if vote.score != UNPARSED)
    score, count = parsed.most_common(1)[0] if parsed else (UNPARSED, 1)
    return votes[0]._replace(score=score if 2 * count > parsed.total() else TIE, rater="")


def majorities(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """One verdict an item."""
    return [majority(votes) for votes in items(verdicts)]
