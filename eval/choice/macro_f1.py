"""F1 averaged over classes, every class alike, for any number of classes."""

from collections.abc import Sequence

import numpy as np

from eval.statistics import Metric, bootstrap_stderr


def macro_f1(pairs: Sequence[Sequence[str]]) -> float:
    """The mean of the classes' F1, from pairs of what is right and what was said.

    Classes that are neither right nor said anywhere do not count, as in scikit-learn.

    >>> round(macro_f1([("yes", "yes"), ("yes", "no"), ("no", "no")]), 4)
    0.6667
    """
    right, said = numbers(pairs)
    return scores(right[None], said[None]).item()


def stderr(pairs: Sequence[Sequence[str]]) -> float | None:
    """Bootstrap error of the same."""
    right, said = numbers(pairs)
    return bootstrap_stderr(lambda rows: scores(right[rows], said[rows]), len(pairs))


def numbers(pairs: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Classes as small numbers."""
    classes = {name: number for number, name in enumerate(sorted({name for pair in pairs for name in pair}))}
    return np.array([classes[a] for a, _ in pairs]), np.array([classes[b] for _, b in pairs])


def scores(right: np.ndarray, said: np.ndarray) -> np.ndarray:
    """(rows, documents) -> (rows,): macro F1 of each row."""
    total, present = np.zeros(len(right)), np.zeros(len(right))
    for name in range(max(right.max(), said.max()) + 1):
        here, there = right == name, said == name
        both = 2.0 * (here & there).sum(-1)
        either = here.sum(-1) + there.sum(-1)
        total += np.divide(both, either, out=np.zeros_like(both), where=either > 0)
        present += either > 0
    return total / present


MACRO_F1 = Metric(macro_f1, stderr)
