"""Ratings of every layout come to the same verdicts, under one name for each system; what is no rating is refused."""

import doctest
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eval.chatbot.systems
from eval.chatbot.ratings import read_ratings
from eval.chatbot.systems import Names, parse_aliases, parse_file_name, short_name
from eval.chatbot.verdicts import FIRST, SECOND, TIE, UNPARSED
from eval.chatbot.votes import Verdict, items, majorities, majority
from models.errors import ConfigError, DataError
from tests.rating_files import rating, voted, write_released, written

SHARED = Path(os.environ["QLORA_SHARED"]) if "QLORA_SHARED" in os.environ else None


def only(read):
    (found,) = read.sets
    return found


# Names


@pytest.mark.parametrize(
    ("short", "spellings"),
    [
        ("guanaco-7b", ["7b-guanaco-vicuna-generations-topp0.9-temp0.7", "7b-guanaco-oa-generations-topp0.9-temp0.7",
                        "answer_guanaco-7b", "guanaco-7b", "Guanaco-7B"]),
        ("guanaco-33b", ["30b-guanaco-vicuna-generations-topp0.9-temp0.7", "answer_guanaco-33b", "33b-guanaco"]),
        ("alpaca-13b", ["13b-alpaca-vicuna-generations-topp0.9-temp0.7"]),
        ("gpt-3.5", ["answer-gpt35", "answer_gpt35", "gpt-3.5", "gpt-3.5-oa-generations", "gpt-3.5-turbo:20230327",
                     "ChatGPT", "generations/answer_gpt35.jsonl"]),
        ("gpt-4", ["answer-gpt4", "gpt-4", "gpt-4-oa-generations", "GPT4", "gpt-4:20230520"]),
        ("vicuna-13b", ["answer-vicuna-13b", "answer_vicuna-13b", "vicuna-13b:20230322-clean-lang",
                        "vicuna-13b-oa-generations"]),
        ("bard", ["answer-bard", "answer_bard", "bard", "bard:20230327"]),
    ],
)  # fmt: skip
def test_a_system_has_one_name_however_files_spell_it(short, spellings):
    assert {short_name(spelling) for spelling in spellings} == {short}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("llama3:8b", "llama3:70b"),
        ("meta/llama-7b", "mine/llama-7b"),
        ("gpt-4", "gpt-4o"),
        ("gpt-4", "gpt-4-0613"),
        ("falcon-30b", "falcon-33b"),
        ("mine-topp0.9", "mine-topp0.7"),
        ("answer", "answers"),
    ],
)
def test_different_systems_keep_different_names(one, other):
    assert short_name(one) != short_name(other)


@given(name=st.text(min_size=1))
def test_a_short_name_is_its_own_and_never_empty(name):
    short = short_name(name)
    assert short or not name.strip()
    if "/" not in short and ":" not in short and "generation" not in short and "answer" not in short:
        assert short_name(short) == short


@pytest.mark.parametrize(
    ("stem", "parts"),
    [
        ("answer-gpt35-vs-answer-vicuna-13b-gpt-4-reviewer-threeclass", ("answer-gpt35", "answer-vicuna-13b", "gpt-4")),
        ("gpt-4-oa-generations-vs-7b-guanaco-oa-generations-topp0.9-temp0.7-gpt-4-reviewer-threeclass",
         ("gpt-4-oa-generations", "7b-guanaco-oa-generations-topp0.9-temp0.7", "gpt-4")),
        ("vicuna-13b-vs-gpt-3.5-gpt4-reviewer", ("vicuna-13b", "gpt-3.5", "gpt-4")),
        ("vicuna-13b-vs-gpt-4-gpt-4-reviewer", ("vicuna-13b", "gpt-4", "gpt-4")),
        ("answer_bard-vs-answer_gpt4-human-reviewer_threeclass", ("answer_bard", "answer_gpt4", "human")),
        ("one-vs-two-mine-reviewer", ("one", "two", "mine")),
        ("one_vs_two", ("one", "two", "")),
        ("a-b-vs-c-d", ("a-b", "c-d", "")),
    ],
)  # fmt: skip
def test_a_file_s_name_tells_systems_and_judge(stem, parts):
    assert parse_file_name(stem) == parts


def test_a_known_system_tells_where_the_judge_s_name_begins():
    assert parse_file_name("a-vs-b-c-d-e-reviewer-threeclass", known="b-c") == ("a", "b-c", "d-e")
    assert parse_file_name("a-vs-b-c-d-e-reviewer-threeclass") == ("a", "b-c-d", "e")


@pytest.mark.parametrize("stem", ["ratings", "-vs-b", "a-vs-", "avsb", ""])
def test_a_name_that_tells_no_pair_is_none(stem):
    assert parse_file_name(stem) is None


def test_an_alias_goes_before_the_rules():
    names = Names(parse_aliases(["answer_x=Mine", "gpt-3.5=chatgpt"]))
    assert [names(name) for name in ("answer_x", "answer-gpt35", "answer_y")] == ["Mine", "chatgpt", "y"]
    assert names.found() == {"Mine": ["answer_x"], "chatgpt": ["answer-gpt35"], "y": ["answer_y"]}


@pytest.mark.parametrize(
    ("aliases", "said"), [(["a"], "NAME=SHORT"), (["=b"], "NAME=SHORT"), (["a=b", "a=c"], "one name")]
)
def test_an_alias_that_is_none_is_refused(aliases, said):
    with pytest.raises(ConfigError, match=said):
        parse_aliases(aliases)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(eval.chatbot.systems).failed == 0


# Reading


def test_the_released_layouts_are_read_beside_each_other(tmp_path):
    write_released(tmp_path)
    read = read_ratings([tmp_path])
    found = {each.label: (each.judge, len(each.verdicts), len(each.grades)) for each in read.sets}
    assert found == {
        "oa-pairwise": ("gpt-4", 953, 0),
        "ratings-human": ("human", 1680, 0),
        "vicuna-pairwise": ("gpt-4", 4480, 0),
        "vicuna-relative": ("gpt-4", 0, 640),
    }
    systems = "alpaca-13b bard gpt-3.5 gpt-4 guanaco-13b guanaco-33b guanaco-65b guanaco-7b vicuna-13b"
    assert list(read.names) == systems.split()
    assert len(read.unparsed) == 13 + 34 + 3
    assert read.warnings == []


def test_files_may_be_named_one_by_one_and_twice(tmp_path):
    (folder,) = write_released(tmp_path, "oa-pairwise")
    files = list(folder.iterdir())
    assert read_ratings([*files, folder, *files]).sets == read_ratings([folder]).sets


def test_files_whose_answers_are_in_the_other_order_are_found_by_their_ids(tmp_path):
    (folder,) = write_released(tmp_path, "vicuna-relative")
    read = read_ratings([folder])
    assert sorted(Path(path).name.split("-generations")[0][:22] for path in read.turned) == [
        "13b-alpaca-vicuna", "7b-guanaco-vicuna", "gpt-3.5-vs-13b-alpaca-"[:22], "gpt-3.5-vs-7b-guanaco-"[:22],
    ]  # fmt: skip
    alone = [path for path in folder.iterdir() if "alpaca" in path.name]
    assert read_ratings(alone).turned == []  # two files do not tell
    answers = written(tmp_path / "answer_gpt35.jsonl", [
        {"question_id": q, "answer_id": f"gpt-3.5 {q}", "text": "...", "model_id": "gpt-3.5-turbo:20230327"}
        for q in range(1, 81)
    ])  # fmt: skip
    assert len(read_ratings(alone, answers=[answers]).turned) == 2


def test_ids_that_say_nothing_leave_the_order_of_the_name(tmp_path):
    for number, pair in enumerate(("a-vs-b", "a-vs-c", "b-vs-c")):
        rows = [rating(q, 1, answer1_id=str(q), answer2_id=str(q)) for q in (1, 2)]
        written(tmp_path / f"{pair}.jsonl", [*rows, rating(3, 1, answer1_id=f"x{number}", answer2_id="")])
    read = read_ratings([tmp_path])
    assert read.turned == []
    assert {(v.first, v.second) for v in only(read).verdicts} == {("a", "b"), ("a", "c"), ("b", "c")}


def test_rows_that_name_their_systems_are_believed_whatever_the_ids(tmp_path):
    for second in "bc":
        row = rating(1, 1, answer1_id=f"answer of {second}", answer2_id="answer of a")
        written(tmp_path / f"a-vs-{second}.jsonl", [row])
        written(tmp_path / "named" / f"{second}.jsonl", [{**row, "system1": "a", "system2": second}])
    assert len(read_ratings(list(tmp_path.glob("*.jsonl"))).turned) == 2
    assert read_ratings([tmp_path / "named"]).turned == []


def test_an_answer_that_two_systems_gave_alike_turns_no_file(tmp_path):
    """The ids of equal texts are equal, so that an answer seems to be the third system's."""
    for first, second in ("ac", "bc", "ab"):
        rows = [rating(q, 1, answer1_id=f"{first}{q}", answer2_id=f"{second}{q}") for q in range(9)]
        ids = {"a": "same", "b": "same", "c": "c9"}
        written(
            tmp_path / f"{first}-vs-{second}.jsonl",
            [*rows, rating(9, 1, answer1_id=ids[first], answer2_id=ids[second])],
        )
    assert read_ratings([tmp_path]).turned == []


def test_rows_that_name_their_systems_need_no_name_of_a_file(tmp_path):
    rows = [rating(q, 2, system1="answer-gpt35", system2="mine", answer1_id="x", answer2_id="y") for q in "ab"]
    read = read_ratings([written(tmp_path / "anything.jsonl", rows)])
    assert only(read).verdicts == [Verdict("a", "gpt-3.5", "mine", SECOND), Verdict("b", "gpt-3.5", "mine", SECOND)]
    named = written(tmp_path / "other" / "x-vs-mine-my-own-judge-reviewer-threeclass.jsonl", rows)
    assert only(read_ratings([named])).judge == "my-own-judge"


def test_stored_scores_count_and_what_the_reply_says_otherwise_is_noted(tmp_path):
    rows = [
        rating(1, 1, text="...\n1", reviewer_id=1),
        rating(2, 3, text="I choose neither.", reviewer_id=1),
        rating(3, 2, text="...\n1", reviewer_id=1),
        rating(4, -1, text="error", reviewer_id=1),
        rating(5, 1, text="What is 3?\n2"),  # of people: the question
    ]
    path = written(tmp_path / "a-vs-b-gpt-4-reviewer-threeclass.jsonl", rows)
    read = read_ratings([path])
    assert [v.score for v in only(read).verdicts] == [1, 3, 2, -1, 1]
    assert read.unparsed == [
        {"where": f"{path}:2", "question": "2", "stored": 3},
        {"where": f"{path}:4", "question": "4", "stored": -1},
    ]
    assert read.differing == [{"where": f"{path}:3", "question": "3", "stored": 2, "parsed": 1}]


def test_scores_given_by_hand_count_and_two_of_minus_one_do_not(tmp_path):
    rows = [
        rating(68, [10, 2], text="First, I will solve", reviewer_id=3),
        rating(69, [-1, -1], text="First, I will solve", reviewer_id=3),
        rating(70, [8.5, 9.0], text="8.5 9\nGood.", reviewer_id=3),
    ]
    read = read_ratings([written(tmp_path / "a-vs-b-gpt4-reviewer.jsonl", rows)])
    assert [grade.scores for grade in only(read).grades] == [(10, 2), None, (8.5, 9)]
    assert [note["stored"] for note in read.unparsed] == [[10, 2], [-1, -1]]


def test_windows_files_blank_lines_and_ids_of_both_kinds_are_read(tmp_path):
    path = tmp_path / "a-vs-b-human-reviewer_threeclass.jsonl"
    path.write_bytes('\ufeff{"question_id": 1, "score": 1}\r\n\r\n{"question_id": "1", "score": 2.0}\r\n'.encode())
    assert [v[:4] for v in only(read_ratings([path])).verdicts] == [("1", "a", "b", 1), ("1", "a", "b", 2)]


def test_folders_and_judges_are_kept_apart_unless_they_are_pooled(tmp_path):
    for name in (
        "one/a-vs-b-gpt-4-reviewer.jsonl",
        "two/a-vs-b-gpt-4-reviewer.jsonl",
        "one/a-vs-b-human-reviewer.jsonl",
    ):
        written(tmp_path / name, [rating()])
    labels = [each.label for each in read_ratings([tmp_path]).sets]
    assert labels == ["one (gpt-4)", "one (human)", "two"]
    pooled = {each.judge: len(each.verdicts) for each in read_ratings([tmp_path], pool=True).sets}
    assert pooled == {"gpt-4": 2, "human": 1}


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path):
    for name in ("x/same", "y/same"):
        written(tmp_path / name / "a-vs-b-gpt-4-reviewer.jsonl", [rating()])
    labels = [each.label for each in read_ratings([tmp_path]).sets]
    assert labels == [f"{tmp_path}/x/same (gpt-4)", f"{tmp_path}/y/same (gpt-4)"]


def test_an_empty_file_is_mentioned_and_nothing_at_all_is_refused(tmp_path):
    (tmp_path / "hollow").mkdir()
    written(tmp_path / "a-vs-b-gpt-4-reviewer.jsonl", [])
    with pytest.raises(DataError, match="there are none in"):
        read_ratings([tmp_path])
    written(tmp_path / "b-vs-a-gpt-4-reviewer.jsonl", [rating()])
    assert read_ratings([tmp_path]).warnings == [f"{tmp_path}/a-vs-b-gpt-4-reviewer.jsonl is empty"]
    with pytest.raises(DataError, match="holds no file of ratings"):
        read_ratings([tmp_path / "hollow"])
    with pytest.raises(DataError, match="does not exist"):
        read_ratings([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"score": 1}, "names no question"),
        ({"question_id": True, "score": 1}, "names no question"),
        (rating(score=4), "score is 4"),
        (rating(score="1"), "score is '1'"),
        (rating(score=True), "score is True"),
        (rating(score=None), "score is None"),
        (rating(score=1.5), "score is 1.5"),
        (rating(score=[8]), r"score is \[8\]"),
        (rating(score=[8, -2]), r"score is \[8, -2\]"),
        (rating(score=[8, "9"]), r"score is \[8, '9'\]"),
        ({"question_id": 1}, "score is None"),
        (rating(system1="x"), "system2 is null"),
        (rating(system1="x", system2=7), "system2 is a number"),
        (rating(system1="x", system2="answer_x"), "both called 'x'"),
        ([1, 2], "is a list"),
    ],
)
def test_a_row_that_is_no_rating_is_refused_with_its_line(tmp_path, row, said):
    path = written(tmp_path / "a-vs-b-gpt-4-reviewer.jsonl", [rating(), rating(), row])
    with pytest.raises(DataError, match=said) as refused:
        read_ratings([path])
    assert f"{path}:3: " in str(refused.value)


@pytest.mark.parametrize("score", ["[NaN, 1]", "NaN", "Infinity", "[1e999, 1]"])
def test_a_score_that_is_no_number_is_refused(tmp_path, score):
    path = tmp_path / "a-vs-b-gpt-4-reviewer.jsonl"
    path.write_text(f'{{"question_id": 1, "score": {score}}}\n')
    with pytest.raises(DataError, match=r"reviewer.jsonl:1: score is"):
        read_ratings([path])


def test_files_that_cannot_be_understood_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"ratings.jsonl:1: says not which systems"):
        read_ratings([written(tmp_path / "ratings.jsonl", [rating()])])
    with pytest.raises(DataError, match="mixes verdicts and pairs of scores"):
        read_ratings([written(tmp_path / "a-vs-b.jsonl", [rating(1, 1), rating(2, [8, 9])])])
    with pytest.raises(DataError, match="by message_id and by question_id"):
        read_ratings([written(tmp_path / "c-vs-d.jsonl", [rating(), {"message_id": "x", "score": 1}])])
    (tmp_path / "e-vs-f.jsonl").write_text('{"question_id": 1, "sco')
    with pytest.raises(DataError, match=r"e-vs-f.jsonl:1: is not JSON"):
        read_ratings([tmp_path / "e-vs-f.jsonl"])


def test_systems_that_are_called_alike_can_be_told_apart(tmp_path):
    path = written(tmp_path / "gpt-3.5-vs-chatgpt-human-reviewer.jsonl", [rating()])
    with pytest.raises(DataError, match=r"both called 'gpt-3.5'.*--alias"):
        read_ratings([path])
    assert list(read_ratings([path], {"chatgpt": "the website"}).names) == ["gpt-3.5", "the website"]


# People's votes


def test_votes_of_people_are_read_from_sqlite_beside_files(tmp_path):
    voted(tmp_path / "votes.sqlite", [("1", "answer_bard", "answer_gpt4", 2, "ann"), ("1", "gpt-4", "bard", 1, "bob")])
    written(tmp_path / "bard-vs-gpt-4-gpt-4-reviewer.jsonl", [rating(1, 2)])
    people, model = sorted(read_ratings([tmp_path]).sets, key=lambda each: each.judge != "human")
    assert (people.judge, model.judge) == ("human", "gpt-4")
    assert people.verdicts == [Verdict("1", "bard", "gpt-4", 2, "ann"), Verdict("1", "gpt-4", "bard", 1, "bob")]
    assert majorities(people.verdicts) == [Verdict("1", "bard", "gpt-4", 2)]


def test_of_a_rater_s_votes_on_one_thing_the_last_counts(tmp_path):
    path = voted(
        tmp_path / "votes.db", [("1", "a", "b", 1, "ann"), ("1", "a", "b", 3, "ann"), ("1", "a", "b", 1, "bob")]
    )
    assert [v.score for v in only(read_ratings([path])).verdicts] == [3, 1]


def test_people_s_files_in_both_orders_belong_together(tmp_path):
    written(tmp_path / "a-vs-b-human-reviewer_threeclass.jsonl", [rating(1, 1), rating(1, 3)])
    written(tmp_path / "b-vs-a-human-reviewer_threeclass.jsonl", [rating(1, 2)])
    written(tmp_path / "a-vs-b-gpt-4-reviewer-threeclass.jsonl", [rating(1, 1)])
    written(tmp_path / "b-vs-a-gpt-4-reviewer-threeclass.jsonl", [rating(1, 2)])
    outcomes = {each.judge: majorities(each.verdicts) for each in read_ratings([tmp_path]).sets}
    assert outcomes["human"] == [Verdict("1", "a", "b", 1)]
    assert outcomes["gpt-4"] == [Verdict("1", "a", "b", 1), Verdict("1", "b", "a", 2)]


@pytest.mark.parametrize(
    ("vote", "said"),
    [
        (("1", "a", "b", 4, "ann"), "vote 1: score is 4"),
        (("1", "a", "b", None, "ann"), "vote 1: score is None"),
        ((None, "a", "b", 1, "ann"), "vote 1: question_id is empty"),
        (("1", " ", "b", 1, "ann"), "vote 1: system_a is empty"),
        (("1", "a", "b", 1, None), "vote 1: rater is empty"),
        (("1", "a", "A", 1, "ann"), "vote 1: 'a' and 'A' are both called 'a'"),
    ],
)
def test_a_vote_that_is_none_is_refused(tmp_path, vote, said):
    with pytest.raises(DataError, match=said):
        read_ratings([voted(tmp_path / "votes.sqlite", [vote])])


def test_a_file_that_holds_no_votes_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "votes.sqlite"
    path.write_bytes(b"not a database, but long enough to look at" * 20)
    with pytest.raises(DataError, match="is no file of votes"):
        read_ratings([path])
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as base:
        base.execute("CREATE TABLE x (y)")
    with pytest.raises(DataError, match="no such table: votes"):
        read_ratings([other])


# Majorities


def vote(score, first="a", second="b", rater="ann", question="1"):
    return Verdict(question, first, second, score, rater)


@pytest.mark.parametrize(
    ("scores", "outcome"),
    [
        ([1, 1, 2], FIRST), ([2, 2, 2], SECOND), ([1, 2, 3], TIE), ([3, 3, 1], TIE), ([2], SECOND), ([1, 2], TIE),
        ([1, 1, 2, 3], TIE), ([1, 1, 1, 2, 3], FIRST), ([-1, 1], FIRST), ([-1, -1], UNPARSED), ([-1, 1, 2], TIE),
    ],
)  # fmt: skip
def test_more_than_half_of_the_parsed_votes_decide(scores, outcome):
    assert majority([vote(score) for score in scores]).score == outcome
    assert majority([vote(score) for score in reversed(scores)]).score == outcome


def test_people_s_votes_belong_together_in_both_orders_a_model_s_do_not():
    both = [vote(FIRST), vote(SECOND, "b", "a"), vote(FIRST, "b", "a", "cid")]
    assert [v.score for v in items(both)[0]] in ([1, 1, 2], [2, 2, 1])
    assert len(items(both)) == 1
    model = [each._replace(rater="") for each in both]
    assert [len(votes) for votes in items(model)] == [1, 2]


@given(scores=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=9), flips=st.lists(st.booleans(), min_size=9))
def test_the_order_in_which_raters_saw_the_answers_does_not_change_the_majority(scores, flips):
    straight = [vote(score) for score in scores]
    mixed = [each.turned() if flip else each for each, flip in zip(straight, flips, strict=False)]
    ours, theirs = majorities(straight)[0], majorities(mixed)[0]
    assert ours == (theirs if theirs.first == "a" else theirs.turned())


@given(score=st.sampled_from([1, 2, 3, -1]))
def test_turning_twice_changes_nothing(score):
    assert vote(score).turned().turned() == vote(score)
    assert vote(FIRST).turned() == Verdict("1", "b", "a", SECOND, "ann")


@pytest.mark.skipif(SHARED is None, reason="QLORA_SHARED does not name a folder with released ratings")
def test_the_compact_fixture_is_the_released_ratings(tmp_path):
    assert SHARED is not None
    write_released(tmp_path)
    data = SHARED / "assets" / "data" / "chatbot"
    ours, theirs = read_ratings([tmp_path]), read_ratings([data / "ratings-gpt4", data / "ratings-human"])
    questions = {f"m{number}" for number in range(1, 954)}
    for one, other in zip(ours.sets, sorted(theirs.sets, key=lambda each: each.label), strict=True):
        assert one.label == other.label
        assert one.grades == other.grades
        if one.label == "oa-pairwise":
            assert {v.question for v in one.verdicts} == questions
            assert [v[1:4] for v in one.verdicts] == [v[1:4] for v in other.verdicts]
        else:
            assert sorted(one.verdicts) == sorted(other.verdicts)
    assert len(theirs.unparsed) == 13 + 34 + 24
    assert len(theirs.turned) == 4
    assert theirs.differing == []
