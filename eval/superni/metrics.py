"""ROUGE-L and exact match of an answer, each the best over all references, in percent.

ROUGE-L is the rouge-score package's, with its stemmer: lower case, what is neither letter nor digit parts words, words
of more than three letters are stemmed (Porter), and the score is F1 of the longest common subsequence. Exact match is
SQuAD's, except that articles stay.
"""

import string
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from eval.statistics import mean

PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """The best ROUGE-L (F1) over the references, 0 to 100; 0 where either side has no word."""
    return 100 * max(scorer().score(reference, prediction)["rougeL"].fmeasure for reference in references)


@cache
def scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """100 if the answer is one of the references, but for case, punctuation and white space; else 0."""
    return 100.0 * any(normalize_answer(prediction) == normalize_answer(reference) for reference in references)


def normalize_answer(text: str) -> str:
    """A text in lower case, without punctuation, its words apart by one space.

    >>> normalize_answer(" The  cat's  (2) ")
    'the cats 2'
    """
    return " ".join(text.lower().translate(PUNCTUATION).split())


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {"rougeL": rouge_l, "exact_match": exact_match}


def compute_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The mean of each metric over some answers, to four places."""
    return averaged([scores(*pair) for pair in zip(predictions, references, strict=True)])


def scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Every metric of one answer."""
    return {name: metric(prediction, references) for name, metric in METRICS.items()}


def averaged(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric, to four places as the reference gives it; there must be a row."""
    return {name: round(mean([row[name] for row in rows]), 4) for name in METRICS}
