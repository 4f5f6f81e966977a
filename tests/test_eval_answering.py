"""Batches: the longest first, of one kind, halved when memory runs out; what was answered is not asked again."""

import sqlite3
from dataclasses import dataclass

import pytest
import torch

from eval.answering import FIRST, TOKENS, answer_all
from eval.cache import Cache
from eval.examinee import Examinee
from models import DataError, Model, load_tokenizer
from models.errors import WriteError
from tests import tiny


@dataclass(frozen=True)
class Count:
    """Answers with its number, and notes the batches that it was asked in."""

    number: int
    length: int = 1
    shared: int | None = None

    @property
    def arguments(self):
        return (str(self.number),)

    @property
    def key(self):
        return "count", self.number, self.length

    @property
    def row(self):
        return self.number if self.shared is None else ("shared", self.shared)

    @classmethod
    def answer(cls, examinee, rows):
        examinee.loaded.batches.append([[it.number for it in row] for row in rows])
        if len(rows) > examinee.loaded.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [[it.number * 10 for it in row] for row in rows]


class Other(Count):
    pass


class Noting(Model):
    """A model that is not computed with: it has room for so many rows, and keeps what it was asked."""

    device = torch.device("cpu")  # pyrefly: ignore

    def __init__(self, room):
        super().__init__()
        self.batches, self.room = [], room


TOKENIZER = load_tokenizer(tiny.TOKENIZER)


def examinee(room=10**9, identity="one"):
    return Examinee(tokenizer=TOKENIZER, architecture="llama", loaded=Noting(room), identity=identity)


def batches(who):
    return who.loaded.batches


def test_the_longest_come_first_and_answers_in_the_order_of_the_requests():
    who = examinee()
    requests = [Count(i, length) for i, length in enumerate((3, 9, 1, 9, 5))]
    assert answer_all(who, requests, 2) == [0, 10, 20, 30, 40]
    assert batches(who) == [[[1], [3]], [[4], [0]], [[2]]]


def test_what_is_the_same_is_asked_once_and_what_shares_a_row_together():
    who = examinee()
    requests = [Count(1), Count(2), Count(1), Count(3, shared=7), Count(4, shared=7)]
    assert answer_all(who, requests, 8) == [10, 20, 10, 30, 40]
    assert batches(who) == [[[1], [2], [3, 4]]]


def test_a_batch_is_of_one_kind():
    who = examinee()
    assert answer_all(who, [Count(1), Other(2), Count(3)], 8) == [10, 20, 30]
    assert sorted(batches(who)) == [[[1], [3]], [[2]]]
    who = examinee()
    assert answer_all(who, [Count(1), Other(1)], 8) == [10, 10]
    assert batches(who) == [[[1]], [[1]]]  # though their rows are equal


def test_auto_is_bounded_by_rows_and_by_tokens():
    who = examinee()
    answer_all(who, [Count(i) for i in range(FIRST + 1)])
    assert [len(batch) for batch in batches(who)] == [FIRST, 1]
    who = examinee()
    answer_all(who, [Count(i, TOKENS["cpu"] // 3) for i in range(7)])
    assert [len(batch) for batch in batches(who)] == [3, 3, 1]
    who = examinee()
    answer_all(who, [Count(i, TOKENS["cpu"] * 2) for i in range(2)])
    assert [len(batch) for batch in batches(who)] == [1, 1]


def test_auto_halves_when_memory_runs_out_and_stays_there():
    who = examinee(room=20)
    assert answer_all(who, [Count(i) for i in range(70)]) == [i * 10 for i in range(70)]
    assert [len(batch) for batch in batches(who)] == [64, 32, 16, 16, 16, 16, 6]


def test_a_batch_size_that_was_asked_for_is_not_changed():
    with pytest.raises(torch.OutOfMemoryError):
        answer_all(examinee(room=3), [Count(i) for i in range(9)], 4)
    with pytest.raises(torch.OutOfMemoryError):
        answer_all(examinee(room=0), [Count(1)])


def test_progress_counts_different_requests():
    told = []
    answer_all(examinee(), [Count(1), Count(1), Count(2), Count(3)], 2, progress=lambda *it: told.append(it))
    assert told == [(2, 3), (3, 3)]


def test_answers_are_kept_and_not_asked_again(tmp_path):
    cache = Cache(tmp_path / "answers.sqlite")
    first = examinee()
    answer_all(first, [Count(1), Count(2)], cache=cache)
    cache.close()
    cache = Cache(tmp_path / "answers.sqlite")
    again = examinee()
    assert answer_all(again, [Count(1), Count(2), Count(3)], cache=cache) == [10, 20, 30]
    assert batches(again) == [[[3]]]
    assert cache.hits == 2
    other = examinee(identity="two")
    answer_all(other, [Count(1)], cache=cache)
    assert batches(other) == [[[1]]]


def test_what_was_answered_before_a_failure_is_kept(tmp_path):
    class Fails(Count):
        @classmethod
        def answer(cls, examinee, rows):
            if rows[0][0].number == 1:
                raise RuntimeError("the power went")
            return super().answer(examinee, rows)

    path = tmp_path / "answers.sqlite"
    requests = [Fails(0, length=10), Fails(1, length=9), Fails(5, length=20)]
    with pytest.raises(RuntimeError, match="power"):
        answer_all(examinee(), requests, 1, Cache(path))
    assert set(Cache(path).known("one", requests).values()) == {50, 0}


def test_numbers_come_back_from_disk_exactly(tmp_path):
    cache = Cache(tmp_path / "a.sqlite")
    values = [[-0.1 - 0.2, True], [float.fromhex("-0x1.fffffffffffffp+3"), False], "text ü\n"]
    requests = [Count(i) for i in range(3)]
    cache.keep("m", dict(zip(requests, values, strict=True)))
    assert list(cache.known("m", requests).values()) == values


def test_a_file_that_holds_no_answers_is_refused(tmp_path):
    (tmp_path / "a.sqlite").write_text("this is a letter, and longer than the header of a database would be" * 20)
    with pytest.raises(DataError, match="not a file of answers"):
        Cache(tmp_path / "a.sqlite")


def test_a_disk_that_takes_no_more_is_said_in_a_sentence(tmp_path):
    cache = Cache(tmp_path / "a.sqlite")
    assert cache.file is not None
    cache.file.execute("PRAGMA max_page_count = 4")

    def fill():
        for number in range(100):
            cache.keep("m", {Count(number): "x" * 1000})

    with pytest.raises(WriteError, match="make room"):
        fill()
    assert sqlite3.connect(tmp_path / "a.sqlite").execute("PRAGMA integrity_check").fetchone() == ("ok",)
