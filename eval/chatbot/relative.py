"""A system's score as a percentage of a reference system's, from a judge's scores out of ten (Table 6 of the paper).

A judge favours the answer that it reads first, so each question is judged in both orders. A column for each order is
the quotient of the two systems' totals. The mean takes each question's scores averaged over the orders that were
parsed, and then the quotient of totals. The paper's interval divides the lower end of the system's mean score by
the upper end of the reference's, as if both were independent; since one reply scores both, resampling the questions
gives a narrower and truer one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from eval.chatbot.elo import Z, draws
from eval.chatbot.ratings import Grade
from models.errors import ConfigError

USUAL = "gpt-3.5"  # what the paper measured by


class Scored(NamedTuple):
    """One parsed reply: the scores of the system and of the reference, and whether the reference was shown first."""

    question: str
    system: float
    reference: float
    reference_first: bool


@dataclass(frozen=True)
class Share:
    """A system's percentage of the reference; None where an order has no parsed reply."""

    system: str
    reference: str
    reference_first: float | None
    system_first: float | None
    mean: float
    half: float
    """Half of the interval as the paper computes it."""
    low: float
    """The 95 % interval over resampled questions."""
    high: float
    questions: int
    replies: int
    unparsed: int


def shares(
    grades: Sequence[Grade],
    reference: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    usual: str = USUAL,
) -> tuple[list[Share], list[str]]:
    """Each system's share, the highest first, and warnings of what could not be counted.

    Without a `reference` it is the one system that all pairs have in common; of two, the `usual` one.
    """
    reference = reference_of(grades, reference, usual)
    warnings: list[str] = []
    beside = sum(reference not in (grade.first, grade.second) for grade in grades)
    if beside:
        warnings.append(f"{beside} ratings compare two systems neither of which is {reference}; they are left out")
    found: list[Share] = []
    for system in sorted({name for g in grades for name in (g.first, g.second) if name != reference}):
        rows = [grade for grade in grades if {grade.first, grade.second} == {system, reference}]
        scored = [oriented(grade.question, grade.first == reference, grade.scores) for grade in rows if grade.scores]
        if scored:
            found.append(share(system, reference, scored, len(rows) - len(scored), resamples, seed))
        elif rows:
            warnings.append(f"{system}: none of {len(rows)} ratings against {reference} was parsed")
        if scored and not sum(each.reference for each in scored):
            warnings.append(f"{system}: {reference} scores 0 throughout; a percentage of that is given as 0")
    return sorted(found, key=lambda each: (-each.mean, each.system)), warnings


def reference_of(grades: Sequence[Grade], reference: str | None, usual: str) -> str:
    pairs = [frozenset((grade.first, grade.second)) for grade in grades]
    everyone = frozenset().union(*pairs)
    if reference is not None:
        if reference not in everyone:
            raise ConfigError(
                f"reference: there is no {reference!r} in the ratings; there are {', '.join(sorted(everyone))}"
            )
        return reference
    common = everyone.intersection(*pairs)
    if len(common) == 1 or usual in common:
        return usual if usual in common else next(iter(common))
    what = f"{' and '.join(sorted(common))} are" if common else "no system is"
    raise ConfigError(f"reference: {what} in every pair of the relative ratings; name one with --reference SYSTEM")


def oriented(question: str, reference_first: bool, scores: tuple[float, float]) -> Scored:
    system, reference = scores[::-1] if reference_first else scores
    return Scored(question, system, reference, reference_first)


def share(
    system: str, reference: str, scored: Sequence[Scored], unparsed: int = 0, resamples: int = 1000, seed: int = 0
) -> Share:
    """The share of one system from its parsed replies, of which there must be one."""
    means = question_means(scored)  # (questions, 2)
    ratio = percent(means[:, 0].sum(), means[:, 1].sum())
    low, high = ratio, ratio
    if len(means) > 1 and resamples > 1:
        random = np.random.default_rng(seed)
        totals = np.concatenate([drawn @ means for drawn in draws(len(means), resamples, random)])
        low, high = np.percentile([percent(*total) for total in totals], [2.5, 97.5])
    return Share(
        system,
        reference,
        column([each for each in scored if each.reference_first]),
        column([each for each in scored if not each.reference_first]),
        ratio,
        paper_half(means),
        float(low),
        float(high),
        len(means),
        len(scored),
        unparsed,
    )


def column(scored: Sequence[Scored]) -> float | None:
    """The quotient of totals in one order."""
    if not scored:
        return None
    return percent(math.fsum(each.system for each in scored), math.fsum(each.reference for each in scored))


def question_means(scored: Sequence[Scored]) -> Float[np.ndarray, "questions 2"]:
    """The two systems' scores on each question, averaged over the orders that were parsed."""
    orders: dict[str, dict[bool, list[tuple[float, float]]]] = {}
    for each in scored:
        in_order = orders.setdefault(each.question, {}).setdefault(each.reference_first, [])
        in_order.append((each.system, each.reference))
    return np.array([np.mean([np.mean(pairs, axis=0) for pairs in both.values()], axis=0) for both in orders.values()])


def paper_half(means: Float[np.ndarray, "questions 2"]) -> float:
    """The mean's distance to its lower end: the system's scores at their lower end, the reference's at their upper."""
    centre, error = means.mean(axis=0), Z * means.std(axis=0) / math.sqrt(len(means))
    return percent(centre[0], centre[1]) - percent(centre[0] - error[0], centre[1] + error[1])


def percent(system: float, reference: float) -> float:
    return 100 * float(system) / float(reference) if reference else 0.0
