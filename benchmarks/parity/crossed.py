"""How certain a difference is that was measured with a few seeds on some questions, when both could have been others.

Seeds and questions are crossed: every seed's model is asked every question. The difference of two kinds with seed s on
question q is D[s, q] = d + S[s] + Q[q] + E[s, q], and its mean varies by var(S)/seeds + var(Q)/questions +
var(E)/(seeds questions). A two-way analysis of variance estimates that without bias as (MS_s + MS_q - MS_e) / (seeds
questions); this is how studies of readers and cases compare two methods. Here neither var(S) nor var(Q) is
taken to be below 0, or agreement by chance would pass for certainty, and Hillis (Statistics in Medicine 26, 2007) gives
the degrees of freedom of Student's t: those of MS_s, or of MS_e where that is larger. In trials with 3 seeds, 250
questions and variances of many kinds, 92 to 98 % of such intervals had the true difference in them. An interval over
seeds alone would be blind to the choice of questions, and one over questions alone to chance in training.
"""

import math

import numpy as np
from jaxtyping import Float
from scipy.stats import norm, t

from benchmarks.quality import Estimate


def crossed(values: Float[np.ndarray, "seeds questions"]) -> Estimate:
    """The mean with its 95 % interval over seeds and questions; of a single seed over questions alone.

    >>> both = crossed(np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]))
    >>> both.value, both.low < 0.75 < both.high
    (0.75, True)
    """
    seeds, questions = values.shape
    if questions < 2:
        raise ValueError(f"an interval takes 2 questions at least, not {questions}")
    mean = float(values.mean())
    if seeds == 1:
        half = float(t.ppf(0.975, questions - 1)) * float(values.std(ddof=1)) / math.sqrt(questions)
        return Estimate(mean, mean - half, mean + half)
    by_seed, by_question = values.mean(axis=1), values.mean(axis=0)
    rest = values - by_seed[:, None] - by_question[None, :] + mean
    ms_seeds = questions * float(by_seed.var(ddof=1))
    ms_questions = seeds * float(by_question.var(ddof=1))
    ms_rest = float((rest**2).sum()) / ((seeds - 1) * (questions - 1))
    of_seeds = max(ms_seeds, ms_rest)  # what the mean varies by where questions are given
    freedom = seeds - 1 if ms_seeds >= ms_rest else (seeds - 1) * (questions - 1)
    total = of_seeds + max(ms_questions - ms_rest, 0.0)
    half = quantile(freedom, total, of_seeds) * math.sqrt(total / (seeds * questions))
    return Estimate(mean, mean - half, mean + half)


def quantile(freedom: int, total: float, of_seeds: float) -> float:
    """Of Student's t: the more of the variance is known from many questions, the nearer to the normal's."""
    share = of_seeds / total if total else 0.0
    return float(t.ppf(0.975, freedom / share**2)) if share > 1e-6 else float(norm.ppf(0.975))


def verdict(difference: Estimate, margin: float, less_is_better: bool = False) -> str:
    """What an interval says, given how large a difference would matter.

    >>> verdict(Estimate(-0.02, -0.05, 0.01), 0.03), verdict(Estimate(0.0, -0.02, 0.02), 0.03)
    ('not told apart', 'equal within the margin')
    """
    if -margin <= difference.low and difference.high <= margin:
        return "equal within the margin"
    if difference.low <= 0 <= difference.high:
        return "not told apart"
    return "better" if (difference.value < 0) == less_is_better else "worse"
