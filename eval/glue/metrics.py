"""GLUE's metrics by their definitions: accuracy, F1 of class 1, Matthews' correlation, Pearson's and Spearman's.

Where a definition divides by zero, because one side is constant, the value is 0 and a warning says so: it is never NaN.

Standard errors come from resampled documents. F1 and Matthews' correlation depend only on how many documents have
which label and prediction, so a resample is one draw of those counts, however many documents there are. For the other
two a resample is how often each document was drawn, which takes one matrix product a batch of them.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from eval.statistics import MEAN, RESAMPLES, Metric, bootstrap_stderr, counted_bootstrap_stderr

Pairs = Sequence[Sequence[float]]  # [label, prediction] of each document
Numbers = Sequence[Any] | np.ndarray
MOST_DRAWN = 10**8  # documents over all resamples of a correlation: seconds; above 1,000 documents resamples are fewer


class UndefinedScore(UserWarning):
    """A metric whose definition gives no number, so that 0 stands for it."""


def accuracy(labels: Numbers, predictions: Numbers) -> float:
    """Share of the predictions that are the label."""
    labels, predictions = sides(labels, predictions)
    return float(np.mean(labels == predictions))


def f1(labels: Numbers, predictions: Numbers) -> float:
    """Harmonic mean of precision and recall of class 1: 2 TP / (2 TP + FP + FN)."""
    labels, predictions = sides(labels, predictions)
    for what, side in (("is predicted", predictions), ("is a label", labels)):
        if not (side == 1).any():
            undefined(f"no 1 {what}, so {'precision' if side is predictions else 'recall'} has no value, and F1 is 0")
    table, classes = table_of(labels, predictions)
    return float(f1_of(table[None], classes)[0])


def matthews(labels: Numbers, predictions: Numbers) -> float:
    """Correlation of classes (Matthews 1975; Gorodkin's form of it for more than two)."""
    labels, predictions = sides(labels, predictions)
    if warned_constant(labels, predictions, "Matthews' correlation"):
        return 0.0
    table, classes = table_of(labels, predictions)
    return float(matthews_of(table[None], classes)[0])


def pearson(labels: Numbers, predictions: Numbers) -> float:
    """Linear correlation."""
    labels, predictions = sides(labels, predictions)
    if warned_constant(labels, predictions, "Pearson's correlation"):
        return 0.0
    x, y = unit(labels), unit(predictions)
    return float(np.clip(x @ y, -1, 1))


def spearman(labels: Numbers, predictions: Numbers) -> float:
    """Correlation of ranks; equal values share the average of theirs."""
    labels, predictions = sides(labels, predictions)
    if warned_constant(labels, predictions, "Spearman's correlation"):
        return 0.0
    x, y = unit(ranks(labels)), unit(ranks(predictions))
    return float(np.clip(x @ y, -1, 1))


MEASURES: dict[str, Callable[[Numbers, Numbers], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def sides(labels: Numbers, predictions: Numbers) -> tuple[Float[np.ndarray, " texts"], Float[np.ndarray, " texts"]]:
    """Both sides in float64; what cannot be scored is refused."""
    x, y = (np.asarray(side, dtype=np.float64) for side in (labels, predictions))
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise ValueError(f"labels have shape {x.shape} and predictions {y.shape}; one of each for every text is needed")
    for name, side in (("labels", x), ("predictions", y)):
        if not np.isfinite(side).all():
            raise ValueError(f"{name} hold {side[~np.isfinite(side)][0]}; finite numbers are needed")
    return x, y


def undefined(said: str) -> None:
    warnings.warn(said, UndefinedScore, stacklevel=3)


def warned_constant(labels: np.ndarray, predictions: np.ndarray, name: str) -> bool:
    """Whether a side is constant, which tells nothing of the other."""
    for what, side in (("predictions", predictions), ("labels", labels)):
        if (side == side[0]).all():
            undefined(f"all {what} are {side[0]:g}, so {name} has no value and is 0")
            return True
    return False


def unit(values: Float[np.ndarray, " texts"]) -> Float[np.ndarray, " texts"]:
    """Values with their mean taken out, as a vector of length 1; scaled on the way, so that no square overflows."""
    values = values / np.abs(values).max()
    values = values - values.mean()
    values = values / np.abs(values).max()
    return values / np.linalg.norm(values)


def ranks(values: Float[np.ndarray, " texts"]) -> Float[np.ndarray, " texts"]:
    """Ranks from 1.

    >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


# Counts of documents by label and prediction


def table_of(
    labels: np.ndarray, predictions: np.ndarray
) -> tuple[Int[np.ndarray, "classes classes"], Float[np.ndarray, " classes"]]:
    """How many documents have a label (row) and a prediction (column), and which classes those are."""
    classes, numbers = np.unique(np.concatenate([labels, predictions]), return_inverse=True)
    cells = numbers[: len(labels)] * len(classes) + numbers[len(labels) :]
    return np.bincount(cells, minlength=len(classes) ** 2).reshape(len(classes), -1), classes


def f1_of(tables: Int[np.ndarray, "draws K K"], classes: Float[np.ndarray, " K"]) -> Float[np.ndarray, " draws"]:
    """F1 of class 1 from counts."""
    one = classes == 1
    hits = tables[:, one, one].sum(-1)
    seen = tables[:, one].sum((-2, -1)) + tables[..., one].sum((-2, -1))
    return 2 * hits / np.maximum(seen, 1)


def matthews_of(tables: Int[np.ndarray, "draws K K"], classes: Float[np.ndarray, " K"]) -> Float[np.ndarray, " draws"]:
    """Matthews' correlation from counts; 0 where a side is constant."""
    tables = tables.astype(np.float64)
    total, hits = tables.sum((-2, -1)), np.trace(tables, axis1=-2, axis2=-1)
    labels, predictions = tables.sum(-1), tables.sum(-2)  # (draws, K)
    spread = np.sqrt(total**2 - (labels**2).sum(-1)) * np.sqrt(total**2 - (predictions**2).sum(-1))
    return (hits * total - (labels * predictions).sum(-1)) / np.where(spread > 0, spread, np.inf)


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
