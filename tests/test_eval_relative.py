"""Percent of a reference: the paper's Table 6, and its rule by algebra."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.chatbot.ratings import Grade, read_ratings
from eval.chatbot.relative import shares
from models.errors import ConfigError
from tests.rating_files import write_released

TABLE_6 = {  # reference first, system first, mean, half of the interval
    "bard": (93.2, 96.4, 94.8, 4.1),
    "vicuna-13b": (91.2, 98.7, 94.9, 4.5),
    "alpaca-13b": (63.8, 76.7, 69.4, 4.2),
    "guanaco-7b": (84.1, 89.8, 87.0, 5.4),
}


def test_table_6(tmp_path):
    (ratings,) = read_ratings(write_released(tmp_path, "vicuna-relative")).sets
    found, warnings = shares(ratings.grades)
    assert warnings == []
    assert [each.system for each in found] == ["vicuna-13b", "bard", "guanaco-7b", "alpaca-13b"]
    for each in found:
        ours = each.reference_first, each.system_first, each.mean, each.half
        assert ours == pytest.approx(TABLE_6[each.system], abs=0.051)
        assert (each.reference, each.questions) == ("gpt-3.5", 80)
        assert each.low < each.mean < each.high
        assert (each.high - each.low) / 2 < each.half  # one reply scores both, so the two are not independent
    assert {each.system: each.unparsed for each in found if each.unparsed} == {"alpaca-13b": 3}


def both_orders(system, reference, scores):
    """Each question's four scores: of system and reference, the reference first, and again the system first."""
    grades = []
    for question, (s1, r1, s2, r2) in enumerate(scores):
        grades.append(Grade(str(question), reference, system, (r1, s1)))
        grades.append(Grade(str(question), system, reference, (s2, r2)))
    return grades


points = st.floats(0.5, 10).map(lambda value: round(value, 1))


@given(scores=st.lists(st.tuples(points, points, points, points), min_size=1, max_size=12))
def test_the_mean_is_the_quotient_of_totals_where_all_is_parsed(scores):
    (found,), _ = shares(both_orders("x", "gpt-3.5", scores), resamples=20)
    s1, r1, s2, r2 = (np.array(column) for column in zip(*scores, strict=True))
    assert found.reference_first == pytest.approx(100 * s1.sum() / r1.sum())
    assert found.system_first == pytest.approx(100 * s2.sum() / r2.sum())
    assert found.mean == pytest.approx(100 * (s1 + s2).sum() / (r1 + r2).sum())
    system, reference = (s1 + s2) / 2, (r1 + r2) / 2
    lower = system.mean() - 1.96 * system.std() / math.sqrt(len(scores))
    upper = reference.mean() + 1.96 * reference.std() / math.sqrt(len(scores))
    assert found.half == pytest.approx(found.mean - 100 * lower / upper)


@given(scores=st.lists(st.tuples(points, points, points, points), min_size=1, max_size=9))
def test_a_system_s_share_of_the_other_is_the_inverse(scores):
    grades = both_orders("x", "y", scores)
    (ours,), (theirs,) = (shares(grades, name, resamples=0)[0] for name in ("x", "y"))
    assert ours.mean * theirs.mean == pytest.approx(100**2)


def test_a_question_whose_one_order_is_unparsed_counts_as_much_as_the_others():
    grades = [
        *both_orders("x", "gpt-3.5", [(4, 8, 6, 8)]),
        Grade("9", "x", "gpt-3.5", (2, 10)),
        Grade("9", "gpt-3.5", "x", None),
    ]
    (found,), warnings = shares(grades, resamples=0)
    assert found.mean == pytest.approx(100 * (5 + 2) / (8 + 10))
    assert (found.questions, found.replies, found.unparsed, warnings) == (2, 3, 1, [])


def test_votes_again_in_one_order_do_not_outweigh_the_other():
    grades = [Grade("1", "x", "gpt-3.5", (8, 10))] * 3 + [Grade("1", "gpt-3.5", "x", (10, 4))]
    assert shares(grades, resamples=0)[0][0].mean == pytest.approx(60)


def test_one_order_alone_has_no_other_column():
    (found,), _ = shares([Grade("1", "x", "gpt-3.5", (5, 10))])
    assert (found.reference_first, found.system_first, found.mean) == (None, 50, 50)
    assert (found.low, found.high, found.half) == (50, 50, 0)


def test_a_reference_of_zeros_has_a_value_and_a_warning():
    (found,), warnings = shares([Grade("1", "x", "gpt-3.5", (5, 0)), Grade("2", "x", "gpt-3.5", (5, 0))])
    assert (found.mean, found.half, found.low, found.high) == (0, 0, 0, 0)
    assert warnings == ["x: gpt-3.5 scores 0 throughout; a percentage of that is given as 0"]


def test_a_system_of_which_nothing_was_parsed_is_mentioned():
    grades = [Grade("1", "x", "gpt-3.5", None), Grade("1", "y", "gpt-3.5", (1, 2))]
    found, warnings = shares(grades)
    assert [each.system for each in found] == ["y"]
    assert warnings == ["x: none of 1 ratings against gpt-3.5 was parsed"]


def test_the_reference_is_the_system_that_every_pair_has():
    grades = [Grade("1", "x", "z", (1, 2)), Grade("1", "z", "y", (2, 1))]
    assert {each.reference for each in shares(grades)[0]} == {"z"}


@pytest.mark.parametrize(
    ("pairs", "reference", "said"),
    [
        ([("x", "y")], None, "x and y are in every pair"),
        ([("x", "y"), ("y", "z"), ("z", "x")], None, "no system is in every pair"),
        ([("x", "y")], "z", "there is no 'z' in the ratings; there are x, y"),
    ],
)
def test_a_reference_that_does_not_follow_has_to_be_named(pairs, reference, said):
    grades = [Grade("1", first, second, (1, 2)) for first, second in pairs]
    with pytest.raises(ConfigError, match=said):
        shares(grades, reference)


def test_pairs_without_the_reference_are_left_out_and_counted():
    grades = [Grade("1", first, second, (1, 2)) for first, second in (("x", "y"), ("y", "z"), ("x", "z"))]
    found, warnings = shares(grades, "x")
    assert [each.system for each in found] == ["y", "z"]
    assert warnings == ["1 ratings compare two systems neither of which is x; they are left out"]


def test_the_interval_over_questions_is_that_of_a_mean_where_the_reference_is_constant():
    random = np.random.default_rng(1)
    system = random.integers(1, 11, size=200).astype(float)
    grades = [Grade(str(q), "x", "gpt-3.5", (score, 10.0)) for q, score in enumerate(system)]
    (found,), _ = shares(grades, resamples=4000)
    half = 1.96 * 10 * system.std() / math.sqrt(200)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
    assert found.half == pytest.approx(half)
