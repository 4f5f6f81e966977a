"""How certain GLUE's metrics are: their spread over resampled documents.

F1 and Matthews' correlation depend only on how many documents have which label and prediction, so a resample is one
draw of those counts, however many documents there are. For the other two a resample is how often each document was
drawn: sums over it are one matrix product, and its ranks follow from those counts in an order that never changes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from eval.glue.metrics import Numbers, f1, f1_of, matthews, matthews_of, pearson, spearman, table_of
from eval.statistics import MEAN, RESAMPLES, Metric, bootstrap_stderr, counted_bootstrap_stderr

Pairs = Sequence[Sequence[float]]  # [label, prediction] of each document
MOST_DRAWN = 10**8  # documents over all resamples of a correlation: seconds; above 1,000 documents resamples are fewer


def table_stderr(pairs: Pairs, statistic: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float | None:
    """Standard error of what depends on the counts alone."""
    table, classes = table_of(*np.array(pairs, dtype=np.float64).T)

    def of_counts(counts: np.ndarray) -> np.ndarray:
        return statistic(counts.reshape(-1, *table.shape), classes)

    return counted_bootstrap_stderr(of_counts, table.ravel())


# Correlations of resampled documents


def correlation_stderr(pairs: Pairs, of_ranks: bool) -> float | None:
    """Standard error of Pearson's correlation, or of Spearman's, whose ranks are those within each resample."""
    x, y = np.array(pairs, dtype=np.float64).T
    weighted = spearman_weighted(x, y) if of_ranks else pearson_weighted(x, y)
    n = len(x)

    def resampled(indices: Int[np.ndarray, "draws texts"]) -> Float[np.ndarray, " draws"]:
        draws = len(indices)
        flat = indices + np.arange(draws)[:, None] * n
        return weighted(np.bincount(flat.ravel(), minlength=draws * n).reshape(draws, n))

    return bootstrap_stderr(resampled, n, draws=min(RESAMPLES, max(MOST_DRAWN // n, 1000)))


def pearson_weighted(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Pearson's correlation as a function of how often each document counts, (draws, texts)."""
    x, y = (side - side.mean() for side in (x, y))  # squares of large numbers would lose digits
    moments = np.stack([x, y, x * x, y * y, x * y], axis=1)  # (texts, 5)

    def correlation(counts: np.ndarray) -> np.ndarray:
        sx, sy, sxx, syy, sxy = (counts.astype(np.float64) @ moments / len(x)).T
        return ratio(sxy - sx * sy, sxx - sx**2, syy - sy**2, floors=(sxx, syy))

    return correlation


def spearman_weighted(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Spearman's correlation likewise."""
    groups = [Ties(side) for side in (x, y)]
    middle = (len(x) + 1) / 2  # the mean of all ranks

    def correlation(counts: np.ndarray) -> np.ndarray:
        (rx, vx), (ry, vy) = (group.ranks(counts, middle) for group in groups)
        rx *= counts
        return ratio(np.einsum("dn,dn->d", rx, ry), vx, vy, floors=(len(x), len(x)))

    return correlation


class Ties:
    """Documents in the order of a value, those with equal ones as a group."""

    def __init__(self, values: np.ndarray) -> None:
        _, self.group, sizes = np.unique(values, return_inverse=True, return_counts=True)
        self.order = np.argsort(self.group, kind="stable")
        self.starts = np.cumsum(sizes) - sizes

    def ranks(self, counts: np.ndarray, middle: float) -> tuple[np.ndarray, np.ndarray]:
        """Ranks less their mean (draws, texts), and the sum of their squares (draws,)."""
        many = np.add.reduceat(counts[:, self.order], self.starts, axis=1)  # (draws, groups)
        each = np.cumsum(many, axis=1) - (many - 1) / 2 - middle
        return each[:, self.group], np.einsum("dg,dg,dg->d", many, each, each)


def ratio(shared: np.ndarray, one: np.ndarray, other: np.ndarray, floors: Sequence[Any]) -> np.ndarray:
    """Covariance over the root of both variances; 0 where one of these is nothing but rounding."""
    constant = (one <= 1e-12 * floors[0]) | (other <= 1e-12 * floors[1])
    return np.where(constant, 0, shared / np.sqrt(np.where(constant, 1, one * other)))


# As an evaluation takes them: values are [label, prediction], and for accuracy 0 or 1


def over_pairs(measure: Callable[[Numbers, Numbers], float], stderr: Callable[[Pairs], float | None]) -> Metric:
    return Metric(lambda pairs: measure(*np.array(pairs, dtype=np.float64).T), stderr)


METRICS = {
    "accuracy": MEAN,
    "f1": over_pairs(f1, lambda pairs: table_stderr(pairs, f1_of)),
    "matthews": over_pairs(matthews, lambda pairs: table_stderr(pairs, matthews_of)),
    "pearson": over_pairs(pearson, lambda pairs: correlation_stderr(pairs, of_ranks=False)),
    "spearman": over_pairs(spearman, lambda pairs: correlation_stderr(pairs, of_ranks=True)),
}
REPORTED = {"accuracy": "acc", "matthews": "mcc"}  # the harness's words where they are others


def reported(measure: str) -> str:
    """A measure's name in results."""
    return REPORTED.get(measure, measure)
