"""How certain a score is: closed forms for means, resampling for everything else.

The names and formulas are those of the lm-evaluation-harness, whose results ours are compared with.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 100_000  # the harness's number of bootstrap draws


@dataclass(frozen=True)
class Metric:
    """How the scores of single documents become one number, and its standard error."""

    aggregate: Callable[[Sequence[Any]], float]
    stderr: Callable[[Sequence[Any]], float | None]
    higher_is_better: bool = True
    micro: bool = False
    """In groups it is a mean over documents, even where their tasks count the same."""


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean, summed exactly.

    >>> mean([0.1] * 10)
    0.1
    """
    return math.fsum(values) / len(values)


def mean_stderr(values: Sequence[float]) -> float | None:
    """Sample standard deviation over the root of the count; None for a single value, which has none.

    >>> mean_stderr([0.0, 1.0])
    0.5
    """
    if len(values) < 2:
        return None
    centre = mean(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def pooled_stderr(stderrs: Sequence[float], sizes: Sequence[int]) -> float | None:
    """Error of the mean over all documents of several tasks, from their own errors, as the harness pools them."""
    if sum(sizes) <= len(sizes):
        return None
    squares = math.fsum((n - 1) * error**2 * n for error, n in zip(stderrs, sizes, strict=True))
    return math.sqrt(squares / (sum(sizes) - len(sizes)) / sum(sizes))


def equal_stderr(stderrs: Sequence[float]) -> float:
    """Error of the plain mean of several tasks' scores, which are independent of each other."""
    return math.sqrt(math.fsum(error**2 for error in stderrs)) / len(stderrs)


def bootstrap_stderr(
    resampled: Callable[[np.ndarray], np.ndarray], count: int, draws: int = RESAMPLES, seed: int = 1234
) -> float | None:
    """Standard deviation of a statistic over resampled documents.

    `resampled` takes indices (draws, count) and gives the statistic of each row; it is called for a few million
    indices at a time.
    """
    if count < 2:
        return None
    random = np.random.default_rng(seed)
    rows = max(1, 2**22 // count)
    found = [
        resampled(random.integers(count, size=(min(rows, draws - begin), count))) for begin in range(0, draws, rows)
    ]
    return float(np.std(np.concatenate(found), ddof=1))


def counted_bootstrap_stderr(
    statistic: Callable[[np.ndarray], np.ndarray], counts: np.ndarray, draws: int = RESAMPLES, seed: int = 1234
) -> float | None:
    """The same where a statistic depends only on how many documents there are of each kind.

    `counts` (kinds,) has them as they were found, and `statistic` takes those of many resamples, (draws, kinds). To
    draw documents and count them is to draw the counts from a multinomial, which takes no longer for more documents.
    """
    total = int(counts.sum())
    if total < 2:
        return None
    random = np.random.default_rng(seed)
    return float(np.std(statistic(random.multinomial(total, counts / total, size=draws)), ddof=1))


MEAN = Metric(mean, mean_stderr)
