"""Perplexities and bits: the log-probability of a text over the number of its tokens, words or bytes.

What a document scores is a pair, its log-probability in nats and its units; totals are divided by totals, so that a
long document counts for more than a short one. Standard errors take documents (or windows) as independent samples
and come from the delta method: a ratio of totals by its linear terms, an exponential by its derivative. (The
harness gives none for these metrics.)
"""

import math
from collections.abc import Sequence

from eval.statistics import Metric

Pair = Sequence[float]  # log-probability in nats, units


def ratio(pairs: Sequence[Pair]) -> float:
    """Sum of the firsts over the sum of the seconds.

    >>> ratio([(1.0, 2), (5.0, 1)])
    2.0
    """
    return math.fsum(first for first, _ in pairs) / math.fsum(second for _, second in pairs)


def ratio_stderr(pairs: Sequence[Pair]) -> float | None:
    """Standard error of the ratio; None for a single pair. With equal units it is that of a mean.

    >>> ratio_stderr([(0.0, 1), (1.0, 1)])
    0.5
    """
    count = len(pairs)
    if count < 2:
        return None
    centre = ratio(pairs)
    squares = math.fsum((first - centre * second) ** 2 for first, second in pairs)
    return math.sqrt(squares / (count - 1) * count) / math.fsum(second for _, second in pairs)


def perplexity_per_unit(pairs: Sequence[Pair]) -> float:
    """The exponential of the mean negative log-probability of a unit; infinite where a float cannot hold it."""
    return exponential(-ratio(pairs))


def perplexity_stderr(pairs: Sequence[Pair]) -> float | None:
    stderr, value = ratio_stderr(pairs), perplexity_per_unit(pairs)
    return None if stderr is None or math.isinf(value) else value * stderr


def bits_per_unit(pairs: Sequence[Pair]) -> float:
    """Mean bits that a unit takes to write with the model's probabilities."""
    return -ratio(pairs) / math.log(2)


def bits_stderr(pairs: Sequence[Pair]) -> float | None:
    stderr = ratio_stderr(pairs)
    return None if stderr is None else stderr / math.log(2)


def exponential(value: float) -> float:
    """e to a power, and infinity beyond what a float holds."""
    return math.exp(value) if value < 700 else math.inf


PERPLEXITY = Metric(perplexity_per_unit, perplexity_stderr, higher_is_better=False)
BITS = Metric(bits_per_unit, bits_stderr, higher_is_better=False)
