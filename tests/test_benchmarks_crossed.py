"""Intervals over seeds and questions at once: the two limits that have a textbook formula, invariances, coverage."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import benchmarks.parity.crossed
from benchmarks.parity.crossed import crossed, verdict
from benchmarks.quality import Estimate


def test_where_seeds_do_not_matter_it_is_the_interval_over_questions():
    questions = np.random.default_rng(0).normal(0.3, 1, 50)
    found = crossed(np.tile(questions, (3, 1)))
    half = stats.norm.ppf(0.975) * questions.std(ddof=1) / 50**0.5
    assert [found.value, found.low, found.high] == pytest.approx(
        [questions.mean(), questions.mean() - half, questions.mean() + half]
    )


def test_where_questions_do_not_matter_it_is_student_s_interval_over_seeds():
    seeds = np.array([0.1, 0.4, -0.2])
    found = crossed(np.tile(seeds[:, None], (1, 20)))
    low, high = stats.t.interval(0.95, 2, seeds.mean(), stats.sem(seeds))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_with_both_it_is_as_worked_out_by_hand():
    found = crossed(np.array([[0.0, 0.0, 3.0], [1.0, 0.0, 5.0]]))
    # mean squares: seeds 1.5 / 1, questions 19 / 2, what is left 1 / 2; 1.5 + 9.5 - 0.5 on (10.5 / 1.5)^2 degrees
    half = stats.t.ppf(0.975, 49) * (10.5 / 6) ** 0.5
    assert (found.low, found.high) == pytest.approx((1.5 - half, 1.5 + half))


def test_one_seed_has_student_s_interval_over_questions():
    questions = np.random.default_rng(1).normal(size=30)
    found = crossed(questions[None])
    low, high = stats.t.interval(0.95, 29, questions.mean(), stats.sem(questions))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_agreement_of_seeds_by_chance_is_not_taken_for_certainty():
    values = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]])  # the same mean, from other questions
    found = crossed(values)
    rest = (
        stats.t.ppf(0.975, 3) * (1 / 3 / 8) ** 0.5
    )  # the mean square that is left is 1/3, on 1 x 3 degrees of freedom
    assert (found.low, found.high) == pytest.approx((0.75 - rest, 0.75 + rest))


def test_one_question_is_refused():
    with pytest.raises(ValueError, match="2 questions at least, not 1"):
        crossed(np.zeros((3, 1)))


@settings(max_examples=30)
@given(st.integers(2, 5), st.integers(2, 40), st.integers(0, 2**32 - 1), st.sampled_from([-2.0, 0.5, 3.0]))
def test_order_does_not_matter_and_scale_and_sign_go_through(seeds, questions, seed, factor):
    values = np.random.default_rng(seed).normal(size=(seeds, questions))
    found, shuffled = crossed(values), crossed(values[::-1, ::-1])
    assert (shuffled.low, shuffled.high) == pytest.approx((found.low, found.high))
    scaled = crossed(values * factor + 1)
    ends = sorted((found.low * factor + 1, found.high * factor + 1))
    assert (scaled.low, scaled.high) == pytest.approx(tuple(ends), abs=1e-9)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize(("of_seeds", "of_questions", "blind"), [(0.05, 1.0, "seeds"), (0.4, 0.8, "questions")])
def test_it_covers_the_truth_where_either_kind_of_chance_alone_does_not(of_seeds, of_questions, blind):
    draw, covered, alone = np.random.default_rng(2), 0, 0
    for _ in range(200):
        values = draw.normal(0, of_seeds, (3, 1)) + draw.normal(0, of_questions, (1, 40)) + draw.normal(0, 0.3, (3, 40))
        both, means = crossed(values), values.mean(axis=1 if blind == "seeds" else 0)
        covered += both.low <= 0 <= both.high
        low, high = stats.t.interval(0.95, len(means) - 1, means.mean(), stats.sem(means))
        alone += low <= 0 <= high
    assert covered > 184
    assert alone < 165


@pytest.mark.parametrize(
    ("low", "high", "less_is_better", "said"),
    [
        (-0.01, 0.02, False, "equal within the margin"),
        (0.01, 0.03, False, "equal within the margin"),  # surely other, and surely not by much
        (-0.04, 0.01, False, "not told apart"),
        (-0.04, -0.01, False, "worse"),
        (-0.04, -0.01, True, "better"),
        (0.01, 0.09, False, "better"),
        (0.01, 0.09, True, "worse"),
    ],
)
def test_a_verdict_asks_both_whether_and_by_how_much(low, high, less_is_better, said):
    assert verdict(Estimate((low + high) / 2, low, high), 0.03, less_is_better) == said


def test_examples():
    assert doctest.testmod(benchmarks.parity.crossed).failed == 0
