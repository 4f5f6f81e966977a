"""Micro-batches dealt among processes: every example once, and the same steps whatever their number."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.parallel import world
from train.data.batches import Batch, Batches
from train.data.dealing import dealt
from train.data.tokenized import Tokenized
from train.loop import accumulated
from train.state import LoopState

counts, sizes = st.integers(0, 40), st.integers(1, 9)


@given(count=counts, size=sizes)
def test_every_part_of_every_micro_batch_is_dealt_once(count, size):
    deals = [deal for rank in range(size) for deal in dealt(count, rank, size)]
    assert len(set(deals)) == len(deals)
    parts = {number: sorted(deal.part for deal in deals if deal.micro_batch == number) for number in range(count)}
    told = {deal.micro_batch: deal.parts for deal in deals}
    assert parts == {number: list(range(told[number])) for number in range(count)}


@given(count=counts, size=sizes)
def test_all_processes_make_as_many_rounds_and_the_last_alone_is_cut(count, size):
    hands = [dealt(count, rank, size) for rank in range(size)]
    assert {len(hand) for hand in hands} == {-(-count // size)}
    whole = count // size
    assert all(deal.parts == 1 for hand in hands for deal in hand[:whole])
    cuts = {deal.parts for hand in hands for deal in hand[whole:]}
    assert not cuts or max(cuts) - min(cuts) <= 1, "as evenly as can be"


def test_one_process_takes_all_in_order():
    assert dealt(3, 0, 1) == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]


def examples(count):
    return [Tokenized([5] * (2 + i % 3), [-100] + [5] * (1 + i % 3), f"f:{i}") for i in range(count)]


def steps(monkeypatch, count, rank, size, *, batch_size=2, accumulation=3, **how):
    """The micro-batches that a process has in each step of two epochs, and in the next one."""
    monkeypatch.setattr(world, "rank", lambda: rank)
    monkeypatch.setattr(world, "size", lambda: size)
    source, state, made = Batches(examples(count), batch_size, 0, seed=3, **how), LoopState(), []
    for group in accumulated(source, accumulation, state, 100):
        made.append((state.epoch, group))
        state.step += 1
        if state.epoch == 2:
            break
    return made


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("how", [{}, {"row_tokens": 6}, {"batch_tokens": 12}])
def test_each_example_comes_once_in_an_epoch_on_any_number_of_processes(monkeypatch, size, how):
    seen = {epoch: [] for epoch in range(3)}
    for rank in range(size):
        for epoch, group in steps(monkeypatch, 23, rank, size, **how):
            seen[epoch] += [where for batch in group for where in batch.where]
    for epoch in (0, 1):
        assert sorted(seen[epoch]) == sorted(f"f:{i}" for i in range(23))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_step_has_the_same_examples_on_any_number_of_processes(monkeypatch, size):
    def by_number(groups):
        """What a step's micro-batches hold by their numbers, as one process after the other has it."""
        found = {}
        for batch in (batch for group in groups for batch in group):
            found.setdefault(batch.number, []).extend(batch.where)
        return found

    alone = [by_number([group]) for _, group in steps(monkeypatch, 23, 0, 1)]
    hands = [[group for _, group in steps(monkeypatch, 23, rank, size)] for rank in range(size)]
    assert [by_number(groups) for groups in zip(*hands, strict=True)] == alone


def test_a_process_reads_no_micro_batches_but_its_own(monkeypatch):
    made, read = Batches.batch, []
    monkeypatch.setattr(
        Batches, "batch", lambda self, rows: read.extend(i for row in rows for i in row) or made(self, rows)
    )
    for rank in range(2):
        groups = steps(monkeypatch, 12, rank, 2, accumulation=4)
        assert read == [int(where[2:]) for _, group in groups for batch in group for where in batch.where]
        read.clear()


def test_a_process_without_rows_has_a_batch_without_any(monkeypatch):
    hands = [steps(monkeypatch, 1, rank, 3, batch_size=1, accumulation=1)[0][1] for rank in range(3)]
    rows = [[len(batch.inputs["input_ids"]) for batch in hand] for hand in hands]
    assert sorted(rows) == [[0], [0], [1]]
    empty = next(batch for hand in hands for batch in hand if not len(batch.inputs["input_ids"]))
    assert (empty.tokens, empty.where) == (0, ())


@pytest.mark.parametrize(
    ("labels", "shape"),
    [
        (torch.zeros(3, 9, dtype=torch.long), (1, 2)),
        (torch.zeros(3, dtype=torch.long), (1,)),
        (torch.zeros(3), (1,)),
    ],
    ids=["texts", "classes", "numbers"],
)
def test_what_stands_in_for_a_batch_has_a_label_of_its_kind(labels, shape):
    ids = torch.full((3, 9), 7)
    for batch in (
        Batch({"input_ids": ids, "labels": labels}),
        Batch({"input_ids": ids, "labels": labels}).without_rows(),
    ):
        made = batch.stand_in().inputs
        assert made["labels"].shape == shape
        assert made["labels"].dtype == labels.dtype
        assert (made["labels"] != -100).all()
        assert made["input_ids"].shape == made["attention_mask"].shape == (1, 2)


def test_the_longest_batch_is_cut_where_all_are():
    batches = Batches(examples(8), 4, 0)
    whole, part = batches.longest(0), batches.longest(0, 2)
    assert len(whole.inputs["input_ids"]) == 4
    assert len(part.inputs["input_ids"]) == 2
    assert part.inputs["attention_mask"].sum() == max(whole.inputs["attention_mask"].sum(1).topk(2).values.sum(), 7), (
        "its longest rows"
    )
