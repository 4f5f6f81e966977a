"""Elo ratings of a tournament, averaged over random orders of its matches, with two kinds of interval.

Every verdict is a match. Two ratings are updated after each, so that the result hangs on the order; the paper shuffles
10,000 times and averages. All orders are played at once: a step takes the next match of every order, and numpy
updates as many pairs of ratings as there are orders. A match is held as a code of two bytes, since there are few
kinds of match (who met whom, and how it ended), and orders are played a block at a time, so that memory is bounded.

The interval over orders says how well the average is known, and nothing else: more orders make it as narrow as one
likes. What the ratings would be with other questions is answered by resampling the questions. That needs no
shuffling: the average over orders follows a differential equation, the update with its expectation in place, which
is solved for all resamples at once.
"""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Integer

from eval.chatbot.verdicts import FIRST, TIE, UNPARSED
from eval.chatbot.votes import Verdict

START = 1000.0
SCALE = 400 / math.log(10)  # points that make the odds e to one; 400 points make them ten to one
Z = 1.96  # standard deviations on either side of a normal 95 % interval

BLOCK = 2**26  # codes of matches held at a time, by each thread: 128 MiB
LANES = 2000  # orders played at once; from here on a step is limited by its arithmetic
THREADS = 4  # more would wait for the interpreter, which starts every step's operations
SHUFFLED = 64  # orders shuffled at once, while they are in cache


@dataclass(frozen=True)
class Matches:
    """A tournament's matches, of which many are of the same kind."""

    systems: tuple[str, ...]
    """Names in alphabetical order; below, systems are places in this list."""
    first: Int[np.ndarray, "kinds"]
    second: Int[np.ndarray, "kinds"]
    outcome: Float[np.ndarray, "kinds"]
    """What the first system scores: 1, 0, or 0.5 for a tie."""
    codes: Int[np.ndarray, "matches"]
    """The kind of each match, in ascending order, so that results do not hang on the order of files."""
    questions: Int[np.ndarray, "matches"]
    """The question of each match, 0 and up."""


@dataclass(frozen=True)
class Elo:
    """The ratings over orders of the matches and over resampled questions, each list one value a system."""

    systems: tuple[str, ...]
    rating: list[float]
    """Means over the orders."""
    order_sd: list[float]
    """Standard deviations over the orders."""
    order_half: list[float]
    """Half the 95 % interval of the mean over orders: 1.96 sd / sqrt(orderings)."""
    low: list[float]
    """The 95 % interval over questions: 2.5 % of the resamples are below this,"""
    high: list[float]
    """and 2.5 % above this."""


def matches_of(verdicts: Sequence[Verdict]) -> Matches:
    """The matches of all verdicts but the unparsed ones, whose systems count all the same."""
    systems = tuple(sorted({name for v in verdicts for name in (v.first, v.second)}))
    place = {name: index for index, name in enumerate(systems)}
    played = [v for v in verdicts if v.score != UNPARSED]
    asked = {name: index for index, name in enumerate(sorted({v.question for v in played}))}
    table = np.array([(place[v.first], place[v.second], v.score, asked[v.question]) for v in played], dtype=np.int64)
    table = table.reshape(-1, 4)
    table = table[np.lexsort(table.T[::-1])]
    kinds, codes = np.unique(table[:, :3], axis=0, return_inverse=True)
    outcome = np.where(kinds[:, 2] == TIE, 0.5, np.where(kinds[:, 2] == FIRST, 1.0, 0.0))
    return Matches(systems, kinds[:, 0], kinds[:, 1], outcome, codes.reshape(-1), table[:, 3])


def elo(
    matches: Matches, k: float = 4.0, orderings: int = 10_000, resamples: int = 1000, seed: int = 0, threads: int = 0
) -> Elo:
    """Ratings with both intervals, which hang on the seed and not on the threads (0: one a core, up to four)."""
    count = len(matches.systems)
    sizes = block_sizes(len(matches.codes), orderings)
    total, squares = np.zeros(count), np.zeros(count)
    with ThreadPoolExecutor(threads or min(len(sizes), os.cpu_count() or 1, THREADS)) as pool:
        blocks = pool.map(lambda each: play(matches, shuffled(matches, each[1], (seed, each[0])), k), enumerate(sizes))
        for ratings in blocks:
            total += (ratings - START).sum(axis=0)
            squares += ((ratings - START) ** 2).sum(axis=0)
    mean = total / orderings
    sd = np.sqrt(np.maximum(squares / orderings - mean**2, 0))
    low, high = over_questions(matches, k, resamples, seed)
    return Elo(
        matches.systems,
        (START + mean).tolist(),
        sd.tolist(),
        (Z * sd / math.sqrt(orderings)).tolist(),
        (START + mean + low).tolist(),
        (START + mean + high).tolist(),
    )


# Over orders


@np.errstate(over="ignore")  # of infinite odds the expected score is 0
def play(matches: Matches, order: Integer[np.ndarray, "matches lanes"], k: float) -> Float[np.ndarray, "lanes systems"]:
    """The final ratings of each lane, which plays the matches of its column from the first row to the last.

    Ratings are kept as differences from the start in units of the scale, so that odds are plain exponentials.
    """
    lanes, count = order.shape[1], len(matches.systems)
    step = k / SCALE
    first, second, won = matches.first.astype(np.intp), matches.second.astype(np.intp), matches.outcome * step
    ratings = np.zeros(lanes * count)
    begin = np.arange(lanes) * count
    a, b = np.empty(lanes, np.intp), np.empty(lanes, np.intp)
    rating_a, rating_b, gain, scored = (np.empty(lanes) for _ in range(4))
    for kinds in order:
        np.take(first, kinds, out=a, mode="clip")  # clip, since raise makes numpy copy the result
        np.take(second, kinds, out=b, mode="clip")
        np.take(won, kinds, out=scored, mode="clip")
        a += begin
        b += begin
        np.take(ratings, a, out=rating_a, mode="clip")
        np.take(ratings, b, out=rating_b, mode="clip")
        np.subtract(rating_b, rating_a, out=gain)
        np.exp(gain, out=gain)
        gain += 1
        np.divide(-step, gain, out=gain)  # minus the expected score
        gain += scored
        rating_a += gain
        rating_b -= gain
        ratings[a] = rating_a
        ratings[b] = rating_b
    return START + SCALE * ratings.reshape(lanes, count)


def shuffled(matches: Matches, lanes: int, seed: tuple[int, int]) -> Integer[np.ndarray, "matches lanes"]:
    """Random orders of the matches, one a column."""
    random = np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed)))
    codes = matches.codes.astype(np.uint16 if len(matches.first) <= 2**16 else np.uint32)
    order = np.empty((len(codes), lanes), codes.dtype)
    for begin in range(0, lanes, SHUFFLED):
        rows = np.tile(codes, (min(SHUFFLED, lanes - begin), 1))
        order[:, begin : begin + SHUFFLED] = random.permuted(rows, axis=1, out=rows).T
    return order


def block_sizes(matches: int, orderings: int) -> list[int]:
    """How many orders each block plays: as many as memory allows, and no less than a step's overhead asks for."""
    size = min(LANES, max(SHUFFLED, BLOCK // max(matches, 1)))
    return [min(size, orderings - begin) for begin in range(0, orderings, size)]


# Over questions


def over_questions(
    matches: Matches, k: float, resamples: int, seed: int
) -> tuple[Float[np.ndarray, "systems"], Float[np.ndarray, "systems"]]:
    """How far below and above its value a system's mean rating lies in 95 % of resampled sets of questions."""
    count, asked = len(matches.systems), len(np.unique(matches.questions))
    if asked < 2 or resamples < 2:
        return np.zeros(count), np.zeros(count)
    pairs, met, won = by_question(matches)
    centre = mean_ratings(pairs, met.sum(axis=0)[None], won.sum(axis=0)[None], count, k)
    found = [
        mean_ratings(pairs, drawn @ met, drawn @ won, count, k)
        for drawn in draws(asked, resamples, np.random.default_rng((seed, 1)))
    ]
    low, high = np.percentile(np.concatenate(found) - centre, [2.5, 97.5], axis=0)
    return low, high


def by_question(
    matches: Matches,
) -> tuple[Int[np.ndarray, "pairs 2"], Float[np.ndarray, "questions pairs"], Float[np.ndarray, "questions pairs"]]:
    """The pairs that met, how often on each question, and what the pair's first system scored there."""
    ends = np.stack([matches.first, matches.second], axis=1)[matches.codes]
    turned = ends[:, 0] > ends[:, 1]
    pairs, pair = np.unique(np.sort(ends, axis=1), axis=0, return_inverse=True)
    outcome = matches.outcome[matches.codes]
    scored = np.where(turned, 1 - outcome, outcome)
    met = np.zeros((matches.questions.max() + 1, len(pairs)))
    won = np.zeros_like(met)
    np.add.at(met, (matches.questions, pair.reshape(-1)), 1.0)
    np.add.at(won, (matches.questions, pair.reshape(-1)), scored)
    return pairs, met, won


def draws(
    questions: int, resamples: int, random: np.random.Generator
) -> Iterator[Float[np.ndarray, "draws questions"]]:
    """How often each question is drawn in each resample, a block of resamples at a time."""
    rows = max(1, 2**22 // questions)
    for begin in range(0, resamples, rows):
        size = min(rows, resamples - begin)
        yield random.multinomial(questions, np.full(questions, 1 / questions), size=size).astype(np.float64)


@np.errstate(over="ignore")
def mean_ratings(
    pairs: Int[np.ndarray, "pairs 2"],
    met: Float[np.ndarray, "draws pairs"],
    won: Float[np.ndarray, "draws pairs"],
    count: int,
    k: float,
) -> Float[np.ndarray, "draws count"]:
    """The mean rating over orders, less the start, as its differential equation gives it.

    A pair meets at a steady rate, and each meeting moves its ratings by what the update is on average there. Steps
    are so short that in one of them no rating goes a tenth of the way to where it tends; when all are there, it ends.
    """
    ends = np.zeros((len(pairs), count))  # +1 for a pair's first system, -1 for its second
    ends[np.arange(len(pairs)), pairs[:, 0]] = 1
    ends[np.arange(len(pairs)), pairs[:, 1]] = -1
    busiest = (met @ np.abs(ends)).max()  # the matches of the system that has most
    steps = max(200, math.ceil(10 * busiest * k / SCALE / 2))  # the steepest slope of an expected score is 1/4
    ratings = np.zeros((len(met), count))
    step = k / SCALE / steps
    for _ in range(steps):
        expected = met / (1 + np.exp(-ratings @ ends.T))
        change = step * (won - expected) @ ends
        ratings += change
        if np.abs(change).max() < 1e-7:  # and with at most a tenth of the way a step, little is left
            break
    return SCALE * ratings
