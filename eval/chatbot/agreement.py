"""How far raters agree: with each other, with another kind of rater, and with themselves in the other order.

A statistic whose definition divides by zero, since all votes are alike or a ranking is constant, has the value
that its docstring says; the caller is told so, so that it can say so too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from jaxtyping import Float, Int

from eval.chatbot.verdicts import FIRST, SECOND, TIE
from eval.chatbot.votes import Verdict, items


@dataclass(frozen=True)
class Kappa:
    """Fleiss' kappa over items, and how it came about."""

    kappa: float
    observed: float
    """Share of the pairs of votes on an item that agree, averaged over items."""
    expected: float
    """The same if votes were drawn from all votes."""
    items: int
    votes: int
    defined: bool
    """False where all votes are alike, and where there is no item with two votes."""


@dataclass(frozen=True)
class Position:
    """What the order of the two answers does."""

    first: int
    second: int
    ties: int
    share: float | None
    """Of the decided verdicts, how many the answer shown first wins; None where there is none."""
    both: int
    """Pairs of answers that were decided in both orders,"""
    same: int
    """and those for the same answer."""
    agreement: float | None
    """The quotient of the two; None where there is none."""


@dataclass(frozen=True)
class Net:
    """What a system did against another, over both orders."""

    wins: int
    losses: int
    ties: int
    questions: int
    """Different ones, answered in either order, whether or not the verdicts were parsed."""

    @property
    def net(self) -> float:
        """Table 12's number: wins less losses by question. (Its caption divides by twice that.)"""
        return (self.wins - self.losses) / self.questions


# Between raters


def fleiss_kappa(counts: Int[np.ndarray, "items categories"]) -> Kappa:
    """Agreement beyond chance of the votes on each item, given how many votes each category has.

    Items may differ in their number of votes; those with fewer than two say nothing and are left out. Where all
    votes are of one category, chance alone agrees fully and kappa is not defined: it is given as 1, the observed
    agreement. Without any item it is 0.
    """
    counts = counts[counts.sum(axis=1) > 1].astype(np.float64)
    if not len(counts):
        return Kappa(0.0, 0.0, 0.0, 0, 0, False)
    votes = counts.sum(axis=1)
    observed = float(((counts * (counts - 1)).sum(axis=1) / (votes * (votes - 1))).mean())
    expected = float(((counts.sum(axis=0) / votes.sum()) ** 2).sum())
    alike = np.count_nonzero(counts.sum(axis=0)) == 1
    kappa = 1.0 if alike else (observed - expected) / (1 - expected)
    return Kappa(kappa, observed, expected, len(counts), int(votes.sum()), not alike)


def between_raters(verdicts: Sequence[Verdict], ties: bool = True) -> Kappa:
    """Kappa of the votes on each item; without `ties`, over the items none of whose votes is one."""
    votes = [[vote.score for vote in item] for item in items(verdicts)]
    return fleiss_kappa(tally([each for each in votes if ties or TIE not in each]))


def between_kinds(one: Sequence[Verdict], other: Sequence[Verdict]) -> Kappa:
    """Kappa between two sets of verdicts, one an item, over the items that both have, shown in the same order."""
    there = {(v.question, v.first, v.second): v.score for v in other}
    keyed = [(v.score, (v.question, v.first, v.second)) for v in one]
    return fleiss_kappa(tally([[score, there[key]] for score, key in keyed if key in there]))


def tally(votes: Sequence[Sequence[int]]) -> Int[np.ndarray, "items 3"]:
    """How many votes of an item are for the first answer, for the second and for a tie; unparsed ones are none."""
    table = [[item.count(score) for score in (FIRST, SECOND, TIE)] for item in map(list, votes)]
    return np.array(table, dtype=np.int64).reshape(-1, 3)


# Between rankings


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b of two lists of values; 0 where one of them is constant.

    >>> round(kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]), 3)
    0.667
    """
    a, b = (np.sign(np.subtract.outer(values, values)) for values in (np.asarray(x), np.asarray(y)))
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale else 0.0


def spearman_rho(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho: Pearson's correlation of the ranks, of which ties share the mean; 0 where one is constant.

    >>> round(spearman_rho([1, 2, 3, 4], [1, 2, 4, 3]), 3)
    0.8
    """
    a, b = (ranks(values) - (len(values) + 1) / 2 for values in (x, y))
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale else 0.0


def constant(values: Sequence[float]) -> bool:
    """Whether a ranking is none, so that nothing correlates with it."""
    return len(set(values)) < 2


def ranks(values: Sequence[float]) -> Float[np.ndarray, "n"]:
    """Ranks from 1, the least value first, ties at the mean of their places."""
    array = np.asarray(values, dtype=np.float64)
    below = (array[:, None] > array).sum(axis=1)
    return below + ((array[:, None] == array).sum(axis=1) + 1) / 2


def median_rank(places: Sequence[int]) -> float:
    """The middle place, or the mean of the middle two.

    >>> median_rank([4, 3, 4]), median_rank([8, 7])
    (4, 7.5)
    """
    return median(places)


# Between orders and systems


def first_position(verdicts: Sequence[Verdict]) -> Position:
    """How often the answer shown first wins, and how often the same answer wins in both orders."""
    first, second, ties = (sum(v.score == score for v in verdicts) for score in (FIRST, SECOND, TIE))
    winners: dict[tuple[str, frozenset[str]], dict[str, set[str]]] = {}
    for v in verdicts:
        if v.score in (FIRST, SECOND):
            in_order = winners.setdefault((v.question, frozenset((v.first, v.second))), {})
            in_order.setdefault(v.first, set()).add(v.first if v.score == FIRST else v.second)
    both = [list(orders.values()) for orders in winners.values() if len(orders) == 2]
    decided = [pair for pair in both if all(len(won) == 1 for won in pair)]  # else raters of one order disagree
    same = sum(one == other for one, other in decided)
    return Position(
        first,
        second,
        ties,
        first / (first + second) if first + second else None,
        len(decided),
        same,
        same / len(decided) if decided else None,
    )


def net_wins(verdicts: Sequence[Verdict]) -> dict[tuple[str, str], Net]:
    """What each system did against each other that it met, in both directions."""
    met: dict[tuple[str, str], list[Verdict]] = {}
    for v in verdicts:
        for side in (v, v.turned()):
            met.setdefault((side.first, side.second), []).append(side)
    found = {}
    for pair, sides in met.items():
        wins, losses, ties = (sum(side.score == score for side in sides) for score in (FIRST, SECOND, TIE))
        found[pair] = Net(wins, losses, ties, len({side.question for side in sides}))
    return found
