"""A judge's reply decides what the released scripts read in it, and nothing else."""

import doctest
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eval.chatbot.verdicts
from eval.chatbot.verdicts import parse_relative, parse_threeclass

SHARED = Path(os.environ["QLORA_SHARED"]) if "QLORA_SHARED" in os.environ else None
with_ratings = pytest.mark.skipif(SHARED is None, reason="QLORA_SHARED does not name a folder with released ratings")


def released(pattern):
    assert SHARED is not None
    files = sorted((SHARED / "assets" / "data" / "chatbot" / "ratings-gpt4").glob(pattern))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@given(explanation=st.text(), verdict=st.integers(1, 3), end=st.sampled_from(["", "\n", " ", "\r\n", "\n\n"]))
def test_the_number_alone_on_the_last_line_decides(explanation, verdict, end):
    assert parse_threeclass(f"{explanation}\n{verdict}{end}") == verdict


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "\n",
        "error",
        "Best answer: 2",
        "2.",
        "4",
        "0",
        "-1",
        "12",
        "[2]",
        "2\nThat is my verdict.",
        "1 2",
        "２",
        "²",
    ],
)
def test_a_reply_that_ends_otherwise_is_not_parsed(reply):
    assert parse_threeclass(reply) == -1


def scores():
    return st.floats(0, 10).map(lambda value: round(value, 1))


@given(first=scores(), second=scores(), between=st.sampled_from([" ", ", ", ",", "\t"]), rest=st.text())
def test_two_numbers_alone_on_the_first_line_are_the_scores(first, second, between, rest):
    assert parse_relative(f"{first:g}{between}{second:g}\n{rest}") == (first, second)
    assert parse_relative(f" {first:g}{between}{second:g} \r\n{rest}") == (first, second)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "error",
        "8",
        "8 9 10",
        "8/10 9/10",
        "(8, 9)",
        "nan 8",
        "inf 8",
        "-1 -1",
        "8 1_0",
        "８ ９",
        "Scores:\n8 9",
        "89",
    ],
)
def test_a_reply_that_begins_otherwise_has_no_scores(reply):
    assert parse_relative(reply) is None


@given(reply=st.text())
def test_no_reply_breaks_a_parser(reply):
    assert parse_threeclass(reply) in (1, 2, 3, -1)
    found = parse_relative(reply)
    assert found is None or min(found) >= 0


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(eval.chatbot.verdicts).failed == 0


@with_ratings
def test_every_released_verdict_is_parsed_to_its_stored_score():
    rows = released("*-pairwise/*.jsonl")
    assert len(rows) >= 5433
    assert [row["review_id"] for row in rows if parse_threeclass(row["text"]) != row["score"]] == []


@with_ratings
def test_released_relative_scores_are_parsed_but_for_those_that_were_given_by_hand():
    rows = released("vicuna-relative/*.jsonl")
    by_hand = [row for row in rows if list(parse_relative(row["text"]) or (-1, -1)) != row["score"]]
    assert (len(rows), len(by_hand)) == (640, 21)
    assert {row["question_id"] for row in by_hand} == {68, 69, 70}
    assert all(parse_relative(row["text"]) is None for row in by_hand)
