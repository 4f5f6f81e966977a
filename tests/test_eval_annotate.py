"""Human votes: who is given what, what is kept, and what a server for one page refuses, all without a browser."""

import json
import os
import re
import sqlite3
from collections import Counter
from itertools import combinations
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qlora
from eval.chatbot.annotate_desk import Rejected, rater_of
from eval.chatbot.annotate_items import Comparison, comparisons
from eval.chatbot.annotate_votes import Votes
from eval.chatbot.answers import read_answers
from eval.chatbot.questions import Question, read_questions
from models.errors import ConfigError, DataError, WriteError
from tests import annotating
from tests.annotating import QUESTIONS, SYSTEMS, Rater, Served, Serving


@pytest.fixture
def paths(tmp_path):
    return annotating.files(tmp_path / "files")


@pytest.fixture
def desk(paths):
    desk = annotating.desk(paths)
    yield desk
    desk.votes.close()


@pytest.fixture
def serving(paths):
    serving = Serving(annotating.desk(paths))
    yield serving
    serving.close()


def rate_all(desk, name, score=1):
    """Vote the same on everything; the texts come back in the order they were shown."""
    shown, state = [], desk.next(name)
    while state["item"] is not None:
        shown.append((state["question"][0]["text"], state["a"], state["b"]))
        state = desk.vote(name, state["item"], score)
    return shown, state


# What is compared


def test_every_pair_of_systems_is_compared_on_every_question(paths):
    items = comparisons(read_questions(paths[0]), [read_answers(path) for path in paths[1:]])
    expected = [(str(n), *sorted(pair)) for pair in combinations(sorted(SYSTEMS), 2) for n in range(1, 5)]
    assert [it.key for it in items] == expected


def test_with_a_reference_only_pairs_with_it_are_compared(paths):
    answers = [read_answers(path) for path in paths[1:]]
    items = comparisons(read_questions(paths[0]), answers, "quartz")
    assert {it.systems for it in items} == {("quartz", "vertigo-13b"), ("quartz", "xylo-7b")}
    with pytest.raises(ConfigError, match="reference gpt is none of the systems given: xylo-7b, quartz"):
        comparisons(read_questions(paths[0]), answers, "gpt")


def test_a_question_that_a_system_did_not_answer_is_left_out(paths):
    paths[1].write_text("".join(paths[1].read_text().splitlines(keepends=True)[1:]))
    items = comparisons(read_questions(paths[0]), [read_answers(path) for path in paths[1:3]])
    assert [it.question.id for it in items] == ["2", "3", "4"]
    other = annotating.write(paths[0].parent / "other.jsonl", [{"question_id": 99, "answer": "Yes."}])
    with pytest.raises(DataError, match=r"other\.jsonl and .*quartz\.jsonl have no answer to a common question"):
        comparisons(read_questions(paths[0]), [read_answers(paths[2]), read_answers(other)])


def test_fewer_than_two_systems_are_refused(paths):
    with pytest.raises(ConfigError, match="1 file of answers was given"):
        comparisons(read_questions(paths[0]), [read_answers(paths[1])])


ITEM = Comparison(Question("1", "Why?"), ("one", "two"), ("first", "second"))


def test_sides_are_drawn_for_each_rater_and_item_and_stay():
    items = [Comparison(Question(str(n), "Why?"), ("one", "two"), ("a", "b")) for n in range(400)]
    flips = {r: [it.shown(r, 0).systems == ("two", "one") for it in items] for r in ("ada", "bob")}
    assert flips["ada"] == [it.shown("ada", 0).systems == ("two", "one") for it in items]
    for flipped in flips.values():
        assert 150 < sum(flipped) < 250  # five standard deviations from 200
    assert 150 < sum(a == b for a, b in zip(*flips.values(), strict=True)) < 250
    assert flips["ada"] != [it.shown("ada", 1).systems == ("two", "one") for it in items]
    assert items[0].flipped.answers == ("b", "a")


def test_a_token_names_rater_item_and_sides_and_says_nothing():
    secret = b"s" * 32
    tokens = {it.token(rater, secret) for it in (ITEM, ITEM.flipped) for rater in ("ada", "bob")}
    assert len(tokens) == 4
    assert ITEM.token("ada", secret) != ITEM.token("ada", b"t" * 32)
    assert all(re.fullmatch("[0-9a-f]{32}", token) for token in tokens)


# Who is given what


def test_a_rater_sees_everything_once_and_the_votes_name_the_sides(desk):
    shown, end = rate_all(desk, "Ada", score=2)
    assert len(set(shown)) == len(shown) == 12
    assert end == {"done": 12, "total": 12, "note": "", "item": None}
    numbers = {text: str(n) for n, text in enumerate(QUESTIONS, 1)}
    for vote, (question, a, b) in zip(desk.votes.all(), shown, strict=True):
        assert (vote.question_id, vote.rater, vote.score) == (numbers[question], "ada", 2)
        assert a.startswith(f"Answer {SYSTEMS.index(vote.system_a)}")
        assert b.startswith(f"Answer {SYSTEMS.index(vote.system_b)}")
    assert {vote.system_a < vote.system_b for vote in desk.votes.all()} == {True, False}


def test_the_order_is_each_raters_own(paths):
    desks = [annotating.desk(paths, votes=f"{n}.sqlite") for n in range(3)]
    ada, again, bob = (rate_all(desk, name)[0] for desk, name in zip(desks, ("ada", "ada", "bob"), strict=True))
    assert ada == again
    assert [it[0] for it in ada] != [it[0] for it in bob]
    for desk in desks:
        desk.votes.close()


def test_the_least_rated_come_first(desk):
    for _ in range(5):
        desk.vote("ada", desk.next("ada")["item"], 3)
    rated = {vote.key for vote in desk.votes.all()}
    for _ in range(7):
        desk.vote("bob", desk.next("bob")["item"], 3)
    assert not {vote.key for vote in desk.votes.of("bob")} & rated
    assert set(desk.votes.counts().values()) == {1}


def test_raters_at_work_at_once_are_given_different_things(desk):
    assert len({json.dumps(desk.next(f"rater {n}")["question"]) + desk.next(f"rater {n}")["a"] for n in range(6)}) > 1
    assert len(set(desk.open.values())) == 6


def test_no_comparison_gets_more_raters_than_asked_for(paths):
    desk = annotating.desk(paths, raters=2)
    for name in ("a", "b"):
        rate_all(desk, name)
    assert desk.next("c") == {"done": 0, "total": 0, "note": "", "item": None}
    assert set(desk.votes.counts().values()) == {2}
    desk.votes.close()


def test_a_vote_that_others_were_quicker_with_is_not_kept(paths):
    desk = annotating.desk(paths[:3], raters=1)
    late = {name: desk.next(name)["item"] for name in "abcdefgh"}  # more raters than the four comparisons
    notes = [desk.vote(name, item, 1)["note"] for name, item in late.items()]
    assert sum(note.startswith("Others have rated") for note in notes) == 4
    assert desk.votes.counts() == {(str(n), "quartz", "xylo-7b"): 1 for n in range(1, 5)}
    desk.votes.close()


def test_the_same_vote_again_counts_once_and_another_does_not_replace_it(desk):
    item = desk.next("ada")["item"]
    assert desk.vote("ada", item, 1)["done"] == 1
    assert desk.vote("ada", item, 1)["note"] == ""
    assert "first vote stands" in desk.vote("ada", item, 2)["note"]
    assert [vote.score for vote in desk.votes.all()] == [1]


def test_undo_takes_votes_back_one_by_one_and_shows_them_again(desk):
    states = [desk.next("ada")]
    for score in (1, 2, 3):
        states.append(desk.vote("ada", states[-1]["item"], score))
    for state in reversed(states[:-1]):
        assert desk.undo("ada") == state
        assert desk.next("ada") == state
    assert desk.votes.all() == []
    with pytest.raises(Rejected, match="no vote to take back"):
        desk.undo("ada")


def test_a_rater_goes_on_with_another_seed_and_an_open_page_keeps_its_sides(paths):
    before = annotating.desk(paths)
    states = {name: before.next(name) for name in "abcdefghijkl"}
    sides = {(s["a"], s["b"]) for s in states.values()}
    before.votes.close()
    desk = annotating.desk(paths, seed=5)
    for name, state in states.items():
        desk.vote(name, state["item"], 1)
    texts = {it.key: dict(zip(it.systems, it.answers, strict=True)) for it in desk.by_key.values()}
    votes = desk.votes.all()
    found = {(texts[vote.key][vote.system_a], texts[vote.key][vote.system_b]) for vote in votes}
    assert found == sides
    desk.votes.close()


@pytest.mark.parametrize("name", ["", "   ", "x" * 61, "a\u202eb", "a\x00b"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(Rejected, match="A name has 1 to 60 letters"):
        rater_of(name)


@settings(max_examples=25)  # a vote is synced to the disk
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["vote", "undo", "next"]), st.integers(1, 3))))
def test_whatever_raters_do_each_votes_once_and_no_more_than_asked_for(tmp_path_factory, steps):
    desk = annotating.desk(annotating.files(tmp_path_factory.mktemp("desk")), raters=2)
    for name, what, score in steps:
        state = desk.next(name)
        if what == "vote" and state["item"] is not None:
            assert desk.vote(name, state["item"], score)["done"] == state["done"] + 1
        elif what == "undo" and state["done"]:
            assert desk.undo(name)["done"] == state["done"] - 1
    votes = desk.votes.all()
    assert max(Counter(vote.key for vote in votes).values(), default=0) <= 2
    assert len({(vote.rater, vote.key) for vote in votes}) == len(votes)
    desk.votes.close()


# The file


def test_the_table_is_as_the_tournament_reads_it(desk):
    desk.vote("Ada", desk.next("Ada")["item"], 3)
    other = sqlite3.connect(desk.votes.path)  # while it is served
    row = other.execute("SELECT question_id, system_a, system_b, score, rater, at FROM votes").fetchone()
    assert row[3:5] == (3, "ada")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", row[5])
    flipped = (row[0], row[2], row[1], 1, "ada", "now")
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        other.execute("INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?)", flipped)
    assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()
    assert desk.votes.path.stat().st_mode & 0o077 == 0


def test_votes_on_other_texts_are_not_mixed(paths):
    desk = annotating.desk(paths)
    rate_all(desk, "ada")
    desk.votes.close()
    paths[1].write_text(paths[1].read_text().replace("Answer 00", "Reply"))
    with pytest.raises(DataError, match=r"votes on other texts than those given, as for question \d and xylo-7b \(4"):
        annotating.desk(paths)


def test_texts_without_votes_may_change(paths):
    annotating.desk(paths).votes.close()
    paths[1].write_text(paths[1].read_text().replace("Answer 00", "Reply"))
    annotating.desk(paths).votes.close()


def test_another_systems_votes_stay_in_the_file_and_out_of_the_way(paths):
    desk = annotating.desk(paths)
    rate_all(desk, "ada")
    desk.votes.close()
    fewer = annotating.desk(paths[:3])
    assert fewer.next("ada") == {"done": 4, "total": 4, "note": "", "item": None}
    assert fewer.summary() == {"comparisons": 4, "complete": 0, "votes": 4, "raters": {"ada": 4}}
    fewer.undo("ada")
    assert len(fewer.votes.all()) == 11
    fewer.votes.close()


def test_a_file_that_holds_something_else_is_left_alone(tmp_path):
    text = tmp_path / "text.sqlite"
    text.write_text("These are not votes, but some words.\n" * 50)
    with pytest.raises(DataError, match="is not a file of votes"):
        Votes(text)
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE answers (key BLOB)")
    other.close()
    with pytest.raises(DataError, match=r"holds other things than votes \(answers\)"):
        Votes(tmp_path / "other.sqlite")
    with pytest.raises(WriteError, match="cannot be opened"):
        Votes(text / "votes.sqlite")


# The server


def test_no_response_names_a_system_and_every_one_is_guarded(serving):
    rater = Rater(serving.address)
    state = rater.next()
    while state["item"] is not None:
        state = rater.vote(state["item"], 1)
    rater.undo()
    for path in ("/annotate.js", "/annotate.css", "/icon.svg"):
        assert rater.request("GET", path)[0] == 200
    for path in ("/votes", "/../annotate.py", "/xylo"):
        assert rater.request("GET", path)[0] == 404
    assert rater.request("OPTIONS", "/vote")[0] == 501
    for response in rater.responses:
        assert not any(name in response for name in (*SYSTEMS, *(f"{name}-id" for name in SYSTEMS)))
        assert "Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self'" in response
        assert "X-Content-Type-Options: nosniff" in response
        assert "Access-Control" not in response
        assert "Python" not in response
    assert len(serving.desk.votes.all()) == 11


def test_it_listens_on_loopback_only(serving):
    assert serving.server.socket.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost:1"}, 403),  # another port of this machine
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Host": "evil.example:80", "Origin": "http://evil.example:80"}, 403),  # a name that was made to point here
        ({"Host": "127.0.0.1.evil.example", "Origin": "http://127.0.0.1.evil.example"}, 403),
        ({"X_Token": "0" * 32}, 403),
        ({"X_Token": "é"}, 403),
        ({"Content_Type": "text/plain"}, 415),  # what a form could send
        ({"Content_Length": "1000000"}, 413),
        ({"Content_Length": "-1"}, 411),
    ],
)
def test_another_page_cannot_vote(serving, headers, status):
    rater = Rater(serving.address)
    item = rater.next()["item"]
    vote = {"rater": "Ada", "item": item, "score": 1}
    found, answer = rater.post("/vote", vote, **headers)
    assert (found, list(answer)) == (status, ["error"])
    assert serving.desk.votes.all() == []
    assert rater.post("/vote", vote)[0] == 200


def test_another_page_cannot_read_the_token(serving):
    rater = Rater(serving.address)
    status, text = rater.request("GET", "/", Host="evil.example")
    assert status == 403
    assert rater.token not in text
    assert serving.desk.votes.secret.hex() not in "".join(rater.responses)


def test_a_tunnel_may_have_another_port(serving):
    rater = Rater(serving.address)
    own = {"Host": "localhost:9000", "Origin": "http://localhost:9000"}
    assert rater.post("/next", {"rater": "Ada"}, **own)[0] == 200


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/vote", b"{", 400),
        ("/vote", b"[" * 60000, 400),
        ("/vote", b"\xff", 400),
        ("/vote", [1], 400),
        ("/vote", {"rater": "Ada", "item": "0" * 32, "score": 1}, 404),
        ("/vote", {"rater": "Ada", "item": 1, "score": 1}, 400),
        ("/vote", {"rater": "Ada", "item": "0" * 32, "score": 4}, 400),
        ("/vote", {"rater": "Ada", "item": "0" * 32, "score": True}, 400),
        ("/vote", {"item": "0" * 32, "score": 1}, 400),
        ("/next", {"rater": ""}, 400),
        ("/undo", {"rater": "Ada"}, 409),
        ("/votes", {"rater": "Ada"}, 404),
    ],
)
def test_what_cannot_be_done_is_said(serving, path, content, status):
    found, answer = Rater(serving.address).post(path, content)
    assert (found, list(answer)) == (status, ["error"])


def test_one_raters_token_is_of_no_use_to_another(serving):
    item = Rater(serving.address).next()["item"]
    assert Rater(serving.address, "Bob").post("/vote", {"rater": "Bob", "item": item, "score": 1})[0] == 404


def test_many_raters_at_once_lose_nothing(serving):
    def rate(name):
        rater = Rater(serving.address, name)
        state = rater.next()
        while state["item"] is not None:
            state = rater.vote(state["item"], 3)
            acknowledged.append(name)

    acknowledged: list[str] = []
    threads = [Thread(target=rate, args=(f"rater {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(serving.desk.votes.counts().values()) == {3}
    assert len(serving.desk.votes.all()) == 36
    assert len(acknowledged) >= 36  # and those that others were quicker with


def test_a_full_disk_is_said_and_the_vote_can_come_again(serving, capsys):
    rater = Rater(serving.address)
    item = rater.next()["item"]
    file = serving.desk.votes.file
    pages = file.execute("PRAGMA max_page_count").fetchone()[0]
    file.execute("CREATE TABLE filler (x)")
    file.execute(f"PRAGMA max_page_count = {file.execute('PRAGMA page_count').fetchone()[0]}")
    while True:  # until no page is left
        try:
            file.execute("INSERT INTO filler VALUES (zeroblob(300))")
        except sqlite3.OperationalError:
            break
    vote = {"rater": "Ada" * 20, "item": item, "score": 1}
    status, answer = 200, {}
    for number in range(200):  # pages of votes have some room left
        name = f"{number:060}"
        got = rater.post("/next", {"rater": name})[1]["item"]
        if got is None:
            break
        status, answer = rater.post("/vote", vote | {"rater": name, "item": got})
        if status != 200:
            break
    assert (status, answer) == (507, {"error": "The vote could not be kept: the disk takes no more."})
    assert "make room" in capsys.readouterr().out
    file.execute(f"PRAGMA max_page_count = {pages}")
    assert rater.vote(item, 1)["done"] == 1


# The command


def test_no_acknowledged_vote_is_lost_when_the_server_is_killed(paths):
    served = Served(paths)
    rater = Rater(served.address)
    state = rater.next()
    for score in (1, 2, 3, 3, 1):
        state = rater.vote(state["item"], score)
    served.kill()
    again = Serving(annotating.desk(paths), served.port)
    assert [vote.score for vote in again.desk.votes.of("ada")] == [1, 2, 3, 3, 1]
    assert rater.next() == state  # the page that is open still has its token, and goes on where it was
    assert rater.vote(state["item"], 2)["done"] == 6
    again.close()


def test_the_command_ends_with_a_summary_and_exports_what_was_voted(paths, capsys):
    served = Served(paths[:3], 0, "--raters", "1")
    rater = Rater(served.address, "Zoë")
    state = rater.next()
    for score in (1, 2, 3):
        state = rater.vote(state["item"], score)
    served.process.send_signal(2)
    out, err = served.process.communicate(timeout=20)
    assert served.process.returncode == 0
    assert json.loads(out) == {
        "votes_file": str(paths[0].parent / "votes.sqlite"),
        "raters_each": 1,
        "comparisons": 4,
        "complete": 3,
        "votes": 3,
        "raters": {"zoë": 3},
    }
    assert "3 of 4 comparisons have their rater; 3 votes by zoë (3)" in err

    out = paths[0].parent / "out"
    arguments = ["--questions", str(paths[0]), "--votes", str(paths[0].parent / "votes.sqlite"), "--export", str(out)]
    assert qlora.main(["annotate", *arguments]) == 0
    assert re.search(r"3 votes in [12] files in", capsys.readouterr().out)
    names = {"xylo-7b-vs-quartz-human-reviewer_threeclass.jsonl", "quartz-vs-xylo-7b-human-reviewer_threeclass.jsonl"}
    assert set(os.listdir(out)) <= names
    rows = [json.loads(line) for path in out.iterdir() for line in path.read_text().splitlines()]
    assert sorted(row["score"] for row in rows) == [1, 2, 3]
    for row in rows:
        assert list(row) == ["question_id", "text", "score"]
        assert row["text"] == QUESTIONS[row["question_id"] - 1]
    votes = Votes(paths[0].parent / "votes.sqlite")
    for vote in votes.all():
        file = out / f"{vote.system_a}-vs-{vote.system_b}-human-reviewer_threeclass.jsonl"
        row = {"question_id": int(vote.question_id), "text": QUESTIONS[int(vote.question_id) - 1], "score": vote.score}
        assert json.dumps(row, separators=(",", ":"), ensure_ascii=False) in file.read_text().splitlines()
    votes.close()


def test_mistakes_have_their_message_and_exit_code(paths, capsys, tmp_path):
    base = ["--questions", str(paths[0]), "--votes", str(tmp_path / "v.sqlite")]
    taken = Serving(annotating.desk(paths))
    answers = [str(path) for path in paths[1:]]
    for more, code, message in (
        ([], 2, "no file of answers was given"),
        ([*answers, "--port", str(taken.server.server_port)], 2, "--port 0 takes any that is free"),
        ([*answers, answers[0]], 2, "are both named xylo-7b"),
        ([*answers, "--reference", "gpt"], 2, "gpt"),
        ([*answers, "--raters", "0"], 2, "raters is 0; it must be at least 1"),
        ([*answers, "--port", "70000"], 2, "port is 70000"),
        ([*answers, str(tmp_path / "none.jsonl")], 3, "none.jsonl cannot be read"),
        (["--export", str(tmp_path / "out")], 2, "there is no such file of votes"),
    ):
        (tmp_path / "v.sqlite").unlink(missing_ok=True)
        assert qlora.main(["annotate", *more, *base]) == code, message
        assert message in capsys.readouterr().err
    taken.close()
