"""GLUE's metrics by their definitions: accuracy, F1 of class 1, Matthews' correlation, Pearson's and Spearman's.

Where a definition divides by zero, because one side is constant, the value is 0 and a warning says so: it is never NaN.
`eval/glue/resampling.py` has the standard errors.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

Numbers = Sequence[Any] | np.ndarray


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
