"""Elo: the vectorised game is the plain one, its mean is what the papers print, and its intervals are what they say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval.chatbot.elo
from eval.chatbot.elo import block_sizes, by_question, elo, matches_of, mean_ratings, play, shuffled
from eval.chatbot.ratings import read_ratings
from eval.chatbot.verdicts import FIRST, SECOND, TIE, UNPARSED
from eval.chatbot.votes import Verdict, majorities
from tests.rating_files import write_released

NAMES = "abcdefgh"


@st.composite
def tournaments(draw, least=1):
    count = draw(st.integers(2, 5))
    pair = st.lists(st.sampled_from(NAMES[:count]), min_size=2, max_size=2, unique=True)
    row = st.tuples(st.integers(0, 5), pair, st.sampled_from([FIRST, SECOND, TIE]))
    rows = draw(st.lists(row, min_size=least, max_size=30))
    return [Verdict(str(question), first, second, score) for question, (first, second), score in rows]


def plainly(verdicts, k):
    """Elo of one order, as its definition says."""
    ratings = {name: 1000.0 for v in verdicts for name in (v.first, v.second)}
    for v in verdicts:
        expected = 1 / (1 + 10 ** ((ratings[v.second] - ratings[v.first]) / 400))
        gain = k * ({FIRST: 1, SECOND: 0, TIE: 0.5}[v.score] - expected)
        ratings[v.first] += gain
        ratings[v.second] -= gain
    return [ratings[name] for name in sorted(ratings)]


def described(matches, codes):
    """Matches as verdicts again."""
    score = {1.0: FIRST, 0.0: SECOND, 0.5: TIE}
    kinds = zip(matches.first, matches.second, matches.outcome, strict=True)
    verdicts = [Verdict("", matches.systems[a], matches.systems[b], score[outcome]) for a, b, outcome in kinds]
    return [verdicts[code] for code in codes]


@given(verdicts=tournaments(), k=st.sampled_from([0.5, 4.0, 32.0]), seed=st.integers(0, 99))
def test_all_orders_at_once_end_as_each_alone(verdicts, k, seed):
    matches = matches_of(verdicts)
    orders = shuffled(matches, 7, (seed, 0))
    for lane, ratings in enumerate(play(matches, orders, k)):
        np.testing.assert_allclose(ratings, plainly(described(matches, orders[:, lane]), k), rtol=1e-12)


@given(verdicts=tournaments(), seed=st.integers(0, 99), lanes=st.sampled_from([1, 64, 65]))
def test_an_order_has_every_match_once(verdicts, seed, lanes):
    matches = matches_of(verdicts)
    orders = shuffled(matches, lanes, (seed, 0))
    assert orders.shape == (len(verdicts), lanes)
    assert (np.sort(orders, axis=0) == matches.codes[:, None]).all()


def test_orders_are_uniform_and_independent():
    matches = matches_of([Verdict("q", "a", "b", score) for score in (FIRST, SECOND, TIE)])
    orders = shuffled(matches, 6000, (3, 0))
    seen = np.unique(orders, axis=1, return_counts=True)[1]
    assert len(seen) == 6
    assert (np.abs(seen - 1000) < 4 * math.sqrt(1000)).all()


@given(verdicts=tournaments(), k=st.sampled_from([4.0, 32.0]))
def test_points_are_neither_made_nor_lost(verdicts, k):
    ratings = elo(matches_of(verdicts), k, orderings=20, resamples=20)
    assert sum(ratings.rating) == pytest.approx(1000 * len(ratings.systems), abs=1e-8)


@given(verdicts=tournaments(), seed=st.randoms())
def test_the_order_of_files_and_rows_is_irrelevant(verdicts, seed):
    mixed = verdicts.copy()
    seed.shuffle(mixed)
    assert elo(matches_of(mixed), orderings=30, resamples=20) == elo(matches_of(verdicts), orderings=30, resamples=20)


@given(verdicts=tournaments())
def test_the_order_of_systems_is_irrelevant(verdicts):
    """Other names change which random orders are drawn, so that order is made irrelevant by drawing many."""
    names: dict[str, str] = dict(zip(NAMES, reversed(NAMES), strict=True))
    renamed = [v._replace(first=names[v.first], second=names[v.second]) for v in verdicts]
    ours, theirs = (elo(matches_of(each), orderings=400, resamples=0) for each in (verdicts, renamed))
    there: dict[str, float] = dict(zip(theirs.systems, theirs.rating, strict=True))
    for name, rating, sd in zip(ours.systems, ours.rating, ours.order_sd, strict=True):
        assert abs(rating - there[names[name]]) <= 6 * sd / 20 + 1e-9


@given(verdicts=tournaments(), k=st.sampled_from([4.0, 32.0]), seed=st.integers(0, 9))
def test_a_match_told_the_other_way_round_is_the_same_match(verdicts, k, seed):
    turned = [v.turned() for v in verdicts]
    np.testing.assert_allclose(plainly(turned, k), plainly(verdicts, k), rtol=1e-12)
    assert np.allclose(*(mean_of(each, k) for each in (turned, verdicts)), atol=1e-9)


@given(verdicts=tournaments(), k=st.sampled_from([4.0, 32.0]))
def test_swapped_results_mirror_the_ratings(verdicts, k):
    swapped = [v._replace(score={FIRST: SECOND, SECOND: FIRST, TIE: TIE}[v.score]) for v in verdicts]
    np.testing.assert_allclose(plainly(swapped, k), [2000 - rating for rating in plainly(verdicts, k)], rtol=1e-12)
    matches, mirrored = matches_of(verdicts), matches_of(swapped)
    orders = shuffled(matches, 5, (0, 0))
    kinds = {kind: at for at, kind in enumerate(zip(mirrored.first, mirrored.second, mirrored.outcome, strict=True))}
    to = np.array([kinds[a, b, 1 - s] for a, b, s in zip(matches.first, matches.second, matches.outcome, strict=True)])
    np.testing.assert_allclose(play(mirrored, to[orders], k), 2000 - play(matches, orders, k), rtol=1e-12)


def test_one_match_and_its_tie_by_hand():
    won = elo(matches_of([Verdict("q", "x", "y", FIRST)]), k=32, orderings=3, resamples=0)
    assert won.rating == pytest.approx([1016, 984])
    tie = elo(matches_of([Verdict("q", "x", "y", TIE)]), k=32, orderings=3, resamples=0)
    assert tie.rating == [1000, 1000]


def test_unparsed_verdicts_are_no_matches_but_their_systems_are_there():
    matches = matches_of([Verdict("q", "x", "y", UNPARSED), Verdict("q", "x", "z", FIRST)])
    assert matches.systems == ("x", "y", "z")
    assert len(matches.codes) == 1
    assert elo(matches, orderings=5, resamples=5).rating[1] == 1000


@pytest.mark.parametrize("verdicts", [[], [Verdict("q", "x", "y", UNPARSED)]])
def test_no_match_leaves_everyone_at_the_start(verdicts):
    ratings = elo(matches_of(verdicts), orderings=10, resamples=10)
    every = [*ratings.rating, *ratings.low, *ratings.high]
    assert every == [1000.0] * len(every)
    assert not any(ratings.order_half)


def test_a_system_that_always_wins_has_a_finite_rating():
    verdicts = [Verdict(str(q), "x", "y", FIRST) for q in range(200)]
    ratings = elo(matches_of(verdicts), k=32, orderings=10, resamples=50)
    assert all(math.isfinite(value) for value in [*ratings.rating, *ratings.low, *ratings.high])
    assert ratings.low == pytest.approx(ratings.rating)  # whatever is drawn, x wins 200 times


def test_odds_beyond_all_floats_are_no_trouble():
    ratings = elo(matches_of([Verdict("q", "x", "y", SECOND)] * 300 + [Verdict("q", "x", "y", FIRST)]), 1000, 5, 5)
    assert all(math.isfinite(value) for value in ratings.rating)
    lanes = play(matches_of([Verdict("q", "x", "y", SECOND)]), np.zeros((900, 3), np.uint16), 1e6)
    assert np.isfinite(lanes).all()


def test_the_same_seed_gives_the_same_on_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(eval.chatbot.elo, "LANES", 16)
    matches = matches_of([Verdict(str(q), a, b, 1 + q % 3) for q in range(40) for a, b in ("ab", "bc", "ca")])
    one, three = (elo(matches, orderings=100, resamples=50, threads=threads) for threads in (1, 3))
    assert one == three
    assert elo(matches, orderings=100, resamples=50, seed=1) != one
    assert block_sizes(120, 100) == [16] * 6 + [4]
    assert elo(matches, orderings=32, resamples=0).rating != elo(matches, orderings=16, resamples=0).rating


def test_blocks_keep_memory_bounded():
    assert max(block_sizes(38_544, 10_000)) * 38_544 <= 2**26  # codes of 2 bytes
    assert sum(block_sizes(38_544, 10_000)) == 10_000
    assert block_sizes(0, 5) == [5]


def mean_of(verdicts, k):
    matches = matches_of(verdicts)
    pairs, met, won = by_question(matches)
    return mean_ratings(pairs, met.sum(axis=0)[None], won.sum(axis=0)[None], len(matches.systems), k)[0]


@settings(max_examples=15)
@given(verdicts=tournaments(least=12))
def test_the_differential_equation_gives_the_mean_over_orders(verdicts):
    ratings = elo(matches_of(verdicts * 5), k=2.0, orderings=2000, resamples=0)
    for ours, mean, sd in zip(mean_of(verdicts * 5, 2.0), ratings.rating, ratings.order_sd, strict=True):
        assert abs(1000 + ours - mean) < 5 * sd / math.sqrt(2000) + 0.3


def test_the_interval_over_questions_is_that_of_a_mean_where_ratings_are_sums():
    """With a tiny K a rating is K times the sum of (score - 1/2), whose error over questions is known."""
    random = np.random.default_rng(5)
    scores = random.choice([FIRST, SECOND, TIE], size=100, p=[0.5, 0.3, 0.2])
    verdicts = [Verdict(str(q // 2), "x", "y", int(score)) for q, score in enumerate(scores)]
    k = 1e-3
    points = np.where(scores == FIRST, 0.5, np.where(scores == SECOND, -0.5, 0)).reshape(50, 2).sum(axis=1) * k
    error = points.std() * math.sqrt(50)
    ratings = elo(matches_of(verdicts), k, orderings=10, resamples=4000)
    assert ratings.rating[0] - 1000 == pytest.approx(points.sum(), rel=1e-3)
    assert (ratings.high[0] - ratings.low[0]) / (2 * 1.96 * error) == pytest.approx(1, abs=0.05)
    assert ratings.low[0] < ratings.rating[0] < ratings.high[0]


@given(verdicts=tournaments(), copies=st.integers(2, 4))
def test_votes_on_one_question_are_drawn_together(verdicts, copies):
    """Copies of every match on the same questions make the ratings surer, not the draw of questions larger."""
    pairs, met, won = by_question(matches_of(verdicts))
    again, met_again, won_again = by_question(matches_of(verdicts * copies))
    np.testing.assert_array_equal(again, pairs)
    np.testing.assert_allclose(met_again, copies * met)
    np.testing.assert_allclose(won_again, copies * won)


# The paper's numbers


def ratings_of(folder, tmp_path, k, orderings=10_000):
    (ratings,) = read_ratings(write_released(tmp_path, folder)).sets
    matches = matches_of(majorities(ratings.verdicts))
    return matches, elo(matches, k, orderings)


def test_table_1_at_k_4(tmp_path):
    matches, found = ratings_of("vicuna-pairwise", tmp_path, k=4)
    assert len(matches.codes) == 4467
    ours = dict(zip(found.systems, found.rating, strict=True))
    table = {
        "gpt-4": 1348, "guanaco-65b": 1022, "guanaco-33b": 992, "vicuna-13b": 974,
        "gpt-3.5": 966, "guanaco-13b": 916, "bard": 902, "guanaco-7b": 879,
    }  # fmt: skip
    assert ours.keys() == table.keys()
    assert {name: ours[name] for name in table if abs(ours[name] - table[name]) > 1.0} == {}
    assert found.order_half == pytest.approx([0.26] * 3 + [0.17] + [0.26] * 4, abs=0.1)
    for low, rating, high in zip(found.low, found.rating, found.high, strict=True):
        assert 20 < rating - low < 50  # tens of points over questions, where the paper prints 1
        assert 20 < high - rating < 50


def test_k_32_gives_gpt_4_more_and_keeps_the_ranks(tmp_path):
    _, found = ratings_of("vicuna-pairwise", tmp_path, k=32, orderings=4000)
    ours = dict(zip(found.systems, found.rating, strict=True))
    assert ours["gpt-4"] == pytest.approx(1374.7, abs=2)
    assert sorted(ours, key=ours.__getitem__, reverse=True) == [
        "gpt-4", "guanaco-65b", "guanaco-33b", "vicuna-13b", "gpt-3.5", "guanaco-13b", "bard", "guanaco-7b",
    ]  # fmt: skip
