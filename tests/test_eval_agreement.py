"""Agreement has the textbook's values, scipy's and the paper's; votes all alike and constant rankings have one too."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import eval.chatbot.agreement
from eval.chatbot.agreement import (
    Net,
    between_kinds,
    between_raters,
    constant,
    first_position,
    fleiss_kappa,
    kendall_tau,
    net_wins,
    ranks,
    spearman_rho,
)
from eval.chatbot.ratings import read_ratings
from eval.chatbot.votes import Verdict, majorities
from tests.rating_files import write_released

FLEISS_1971 = [  # ten psychiatric patients' diagnoses by fourteen raters, as the textbook example has them
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip

values = st.lists(st.integers(0, 6).map(float), min_size=2, max_size=12)
pairs = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 6).map(float), min_size=n, max_size=n)] * 2)
)


def test_fleiss_kappa_of_the_textbook_example():
    found = fleiss_kappa(np.array(FLEISS_1971))
    assert (found.observed, found.expected, found.kappa) == pytest.approx((0.378, 0.213, 0.210), abs=5e-4)
    assert (found.items, found.votes, found.defined) == (10, 140, True)


@given(counts=st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=12))
def test_kappa_counts_the_pairs_of_votes_that_agree(counts):
    table = np.array(counts)
    found = fleiss_kappa(table)
    kept = [[category for category, n in enumerate(row) for _ in range(n)] for row in counts if sum(row) > 1]
    assert found.items == len(kept)
    assert np.isfinite(found.kappa)
    assert found.kappa <= 1 + 1e-12
    if kept:
        agree = [np.mean([a == b for i, a in enumerate(v) for j, b in enumerate(v) if i != j]) for v in kept]
        assert found.observed == pytest.approx(np.mean(agree))
    assert np.isclose(found.kappa, fleiss_kappa(table[::-1, ::-1]).kappa)  # items and categories have no order


@pytest.mark.parametrize(
    ("counts", "kappa"), [([[3, 0, 0], [3, 0, 0]], 1.0), ([[0, 2, 0]], 1.0), ([], 0.0), ([[1, 0, 0]], 0.0)]
)
def test_votes_that_are_all_alike_have_a_value_that_is_not_defined(counts, kappa):
    found = fleiss_kappa(np.array(counts, dtype=np.int64).reshape(-1, 3))
    assert (found.kappa, found.defined) == (kappa, False)


def test_complete_agreement_and_complete_disagreement():
    assert fleiss_kappa(np.array([[2, 0, 0], [0, 2, 0]])).kappa == 1
    assert fleiss_kappa(np.array([[1, 1, 0], [1, 1, 0]])).kappa == -1


@given(both=pairs)
def test_rank_correlations_are_scipy_s(both):
    x, y = both
    if constant(x) or constant(y):
        assert kendall_tau(x, y) == spearman_rho(x, y) == 0
    else:
        assert kendall_tau(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
        assert spearman_rho(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


@given(x=values)
def test_ranks_are_scipy_s(x):
    np.testing.assert_array_equal(ranks(x), stats.rankdata(x))


def test_the_paper_s_rankings_agree_as_recomputed():
    """Table 7's ranks by people and by GPT-4; the paper's 0.43 leaves GPT-4 out."""
    people, gpt4 = [1, 2, 4, 7, 5, 6, 3, 8], [1, 2, 3, 5, 4, 6, 8, 7]
    assert (kendall_tau(people, gpt4), spearman_rho(people, gpt4)) == pytest.approx((0.571, 0.619), abs=5e-4)
    assert (kendall_tau(people[1:], gpt4[1:]), spearman_rho(people[1:], gpt4[1:])) == pytest.approx(
        (0.429, 0.429), abs=5e-4
    )


@pytest.mark.parametrize(("x", "y"), [([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0])])
def test_no_ranking_correlates_with_nothing(x, y):
    assert kendall_tau(x, y) == spearman_rho(x, y) == 0


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(eval.chatbot.agreement).failed == 0


# Verdicts


def test_first_position_by_hand():
    verdicts = [
        Verdict("1", "a", "b", 1), Verdict("1", "b", "a", 2),  # a in both orders
        Verdict("2", "a", "b", 1), Verdict("2", "b", "a", 1),  # whoever is first
        Verdict("3", "a", "b", 1), Verdict("3", "b", "a", 3),  # decided in one order only
        Verdict("4", "a", "b", -1), Verdict("4", "b", "a", 2),
    ]  # fmt: skip
    found = first_position(verdicts)
    assert (found.first, found.second, found.ties, found.share) == (4, 2, 1, 4 / 6)
    assert (found.both, found.same, found.agreement) == (2, 1, 0.5)
    nothing = first_position([Verdict("1", "a", "b", 3)])
    assert (nothing.share, nothing.agreement) == (None, None)


def test_net_wins_by_hand():
    verdicts = [
        Verdict("1", "a", "b", 1), Verdict("1", "b", "a", 2), Verdict("2", "a", "b", 3), Verdict("2", "b", "a", 1),
        Verdict("3", "a", "b", -1), Verdict("3", "b", "a", -1), Verdict("3", "a", "c", 2),
    ]  # fmt: skip
    found = net_wins(verdicts)
    assert found["a", "b"] == Net(wins=2, losses=1, ties=1, questions=3)
    assert found["b", "a"] == Net(wins=1, losses=2, ties=1, questions=3)
    assert found["a", "b"].net == -found["b", "a"].net == 1 / 3
    assert found["c", "a"].net == 1
    assert ("b", "c") not in found


def test_agreement_between_kinds_is_over_what_both_saw_in_the_same_order():
    one = [Verdict("1", "a", "b", 1), Verdict("2", "a", "b", 2), Verdict("3", "a", "b", 1), Verdict("4", "a", "b", -1)]
    other = [Verdict("1", "a", "b", 1), Verdict("2", "b", "a", 2), Verdict("3", "a", "b", 2), Verdict("4", "a", "b", 1)]
    found = between_kinds(one, other)
    assert (found.items, found.observed, found.expected) == (2, 0.5, (3 / 4) ** 2 + (1 / 4) ** 2)
    assert between_kinds(one, []).items == 0


def test_the_paper_s_order_effects_and_table_12(tmp_path):
    write_released(tmp_path)
    sets = {each.label: each.verdicts for each in read_ratings([tmp_path]).sets}
    found = first_position(sets["vicuna-pairwise"])
    assert (found.share, found.agreement) == pytest.approx((0.650, 0.736), abs=5e-4)

    order = ["guanaco-65b", "guanaco-33b", "vicuna-13b", "gpt-3.5", "bard", "guanaco-13b", "guanaco-7b"]
    table = [
        [0.21, 0.19, 0.16, 0.72, 0.59, 0.86],
        [0.17, 0.10, 0.51, 0.41, 0.68],
        [0.10, 0.50, 0.20, 0.57],
        [0.35, 0.19, 0.40],
        [0.12, 0.03],
        [0.20],
    ]
    net = net_wins(majorities(sets["vicuna-pairwise"]))
    assert {each.questions for each in net.values()} == {80}
    for row, cells in enumerate(table):
        for column, printed in enumerate(cells, row + 1):
            assert abs(net[order[row], order[column]].net - printed) < 0.011

    people = sets["ratings-human"]
    assert between_raters(people).items == 560
    assert between_raters(people).kappa == pytest.approx(plain_kappa([list(map(int, v)) for v in triples(people)]))
    assert between_raters(people, ties=False).items == sum("3" not in each for each in triples(people))
    both = between_kinds(majorities(sets["vicuna-pairwise"]), majorities(people))
    there = {v[:3]: v.score for v in sets["vicuna-pairwise"]}
    matched = [[there[v[:3]], v.score] for v in majorities(people) if there[v[:3]] != -1]
    assert both.kappa == pytest.approx(plain_kappa(matched))
    assert both.items == len(matched)


def triples(people):
    votes = {}
    for v in people:
        votes[v[:3]] = votes.get(v[:3], "") + str(v.score)
    return list(votes.values())


def plain_kappa(votes):
    """Fleiss' kappa where all items have as many votes, vote by vote."""
    every = [score for item in votes for score in item]
    n = len(votes[0])
    observed = np.mean([sum(item.count(s) * (item.count(s) - 1) for s in (1, 2, 3)) / (n * (n - 1)) for item in votes])
    expected = sum((every.count(s) / len(every)) ** 2 for s in (1, 2, 3))
    return (observed - expected) / (1 - expected)
