"""The order of batches: every example once an epoch, decided by seed and epoch alone, from any place on."""

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ConfigError
from train.data.batches import IGNORED, Batches, Tokenized
from train.data.order import mixed
from train.loop import BatchSource

# Plain numbers: beartype's checks draw from the global generator, which hypothesis forbids to strategies.
sizes = st.lists(st.integers(2, 9), min_size=1, max_size=30)
pairs = st.lists(st.tuples(st.integers(2, 9), st.integers(1, 9)), min_size=1, max_size=30)


def made(sizes):
    return [Tokenized([n + 1] * size, [IGNORED] + [n + 1] * (size - 1), f"f:{n}") for n, size in enumerate(sizes)]


def translated(sizes):
    return [Tokenized([n + 1] * size, [n + 1] * target, f"f:{n}") for n, (size, target) in enumerate(sizes)]


orders = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 7),
        "seed": st.none() | st.integers(0, 2**32),
        "group_by_length": st.booleans(),
        "batch_tokens": st.none() | st.integers(9, 60),
        "row_tokens": st.none() | st.just(9),
    }
)


def listed(batches, epoch):
    """The examples of each batch."""
    return [[i for row in batch for i in row] for batch in batches.order(epoch)]


@given(sizes=sizes, order=orders, epoch=st.integers(0, 3))
def test_an_epoch_has_every_example_once_in_as_many_batches_as_it_says(sizes, order, epoch):
    batches = Batches(made(sizes), pad_id=0, **order)
    seen = [where for batch in batches.epoch(epoch) for where in batch.where]
    assert sorted(seen) == sorted(f"f:{n}" for n in range(len(sizes)))
    fresh = Batches(made(sizes), pad_id=0, **order)
    assert isinstance(fresh, BatchSource)
    assert fresh.count(epoch) == len(list(batches.epoch(epoch)))


@given(sizes=sizes, order=orders, epoch=st.integers(0, 3))
def test_batches_have_a_fixed_number_of_rows_or_keep_to_their_tokens(sizes, order, epoch):
    shapes = [b.inputs["input_ids"].shape for b in Batches(made(sizes), pad_id=0, **order).epoch(epoch)]
    if order["batch_tokens"] is None:
        assert sum(rows != order["batch_size"] for rows, _ in shapes) <= 1
        assert all(rows <= order["batch_size"] for rows, _ in shapes)
    else:
        assert all(rows * width <= order["batch_tokens"] for rows, width in shapes)


@given(sizes=pairs, order=orders, budget=st.integers(18, 80))
def test_a_target_of_its_own_counts_among_the_tokens(sizes, order, budget):
    order: Any = {**order, "batch_tokens": budget, "row_tokens": None}
    batches = list(Batches(translated(sizes), pad_id=0, **order).epoch(0))
    for batch in batches:
        assert batch.inputs["input_ids"].numel() + batch.inputs["labels"].numel() <= budget
    assert sum(len(batch.where) for batch in batches) == len(sizes)


@given(sizes=sizes, seed=st.none() | st.integers(0, 9), budget=st.integers(9, 60))
def test_a_batch_ends_only_where_the_next_row_would_not_fit(sizes, seed, budget):
    shapes = [b.inputs["attention_mask"] for b in Batches(made(sizes), 1, 0, seed, batch_tokens=budget).epoch(0)]
    for batch, following in pairwise(shapes):
        width = max(batch.shape[1], int(following[0].sum()))
        assert (len(batch) + 1) * width > budget


@given(sizes=sizes, order=orders, epoch=st.integers(0, 3))
def test_the_order_asks_and_moves_no_global_random_state(sizes, order, epoch):
    examples = made(sizes)
    before, batches = torch.get_rng_state(), Batches(examples, pad_id=0, **order)
    first = list(batches.order(epoch))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3), random.random(), np.random.rand()
    again = Batches(examples, pad_id=0, **order)
    again.order(epoch + 1)  # epochs can be asked for in any order
    assert list(again.order(epoch)) == first


@given(sizes=sizes, order=orders, start=st.integers(0, 35))
def test_starting_at_a_batch_equals_skipping_those_before(sizes, order, start):
    examples = made(sizes)
    batches = Batches(examples, pad_id=0, **order)
    skipped, started = list(batches.epoch(2))[start:], list(batches.epoch(2, start))
    assert len(skipped) == len(started)
    for a, b in zip(skipped, started, strict=True):
        assert a.where == b.where
        assert all(torch.equal(a.inputs[key], b.inputs[key]) for key in a.inputs)


class Counted(list):
    """Examples that say which of them were asked for."""

    asked: tuple[int, ...] = ()

    def __getitem__(self, index):
        self.asked = (*self.asked, index)
        return super().__getitem__(index)


@pytest.mark.parametrize("row_tokens", [None, 20])
def test_starting_at_a_batch_makes_none_of_those_before(row_tokens):
    examples = Counted(made([3, 5, 9] * 20))
    batches = Batches(examples, 4, 0, 1, row_tokens=row_tokens)
    examples.asked = ()  # beartype has looked at some
    last = list(batches.epoch(1, batches.count(1) - 1))
    assert len(last) == 1
    assert len(examples.asked) == len(last[0].where)


@given(sizes=sizes, order=orders)
def test_the_longest_batch_is_one_of_the_epochs_and_none_has_more_tokens(sizes, order):
    batches = Batches(made(sizes), pad_id=0, **order)
    longest, epoch = batches.longest(), list(batches.epoch(0))
    assert longest.where in [batch.where for batch in epoch]
    assert longest.inputs["input_ids"].numel() == max(batch.inputs["input_ids"].numel() for batch in epoch)


def test_seeds_and_epochs_change_the_order_and_no_seed_keeps_the_files():
    examples = made([2] * 50)
    shuffled = [listed(Batches(examples, 5, 0, seed), epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({str(order) for order in shuffled}) == 4
    assert listed(Batches(examples, 50, 0), 3) == [list(range(50))]


def test_no_place_in_the_order_is_dearer_to_an_example():
    count, epochs = 20, 400
    batches = Batches(made([2] * count), count, 0, 7)
    places = np.array([np.argsort(listed(batches, epoch)[0]) for epoch in range(epochs)])
    met = np.stack([np.bincount(column, minlength=count) for column in places.T])
    expected = epochs / count
    chi_squared = ((met - expected) ** 2 / expected).sum()
    degrees = (count - 1) ** 2  # of a table whose rows and columns have a fixed sum
    assert abs(chi_squared - degrees) < 5 * (2 * degrees) ** 0.5


def test_the_hash_is_splitmix64():
    # Published values: the first five of the generator that starts from 1234567.
    assert mixed(np.arange(1, 6, dtype=np.uint64), 1234567).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("limit", [{}, {"batch_tokens": 800}])
@pytest.mark.parametrize("seed", [None, 3])
def test_grouping_by_length_saves_padding(seed, limit):
    draw = random.Random(0)
    examples = made([draw.randint(2, 100) for _ in range(400)])
    padded = [
        sum(
            b.inputs["input_ids"].numel()
            for b in Batches(examples, 8, 0, seed, group_by_length=grouped, **limit).epoch(0)
        )
        for grouped in (False, True)
    ]
    real = sum(len(e.input_ids) for e in examples)
    assert padded[1] - real < (padded[0] - real) / 8


def test_grouped_batches_still_mix_differently_every_epoch():
    batches = Batches(made([n % 10 + 2 for n in range(600)]), 4, 0, 5, group_by_length=True)
    first, second = ({frozenset(batch) for batch in listed(batches, epoch)} for epoch in (0, 1))
    assert len(first & second) < len(first) / 10


def test_grouped_batches_come_in_no_order_of_length():
    examples = made(range(2, 202))
    widths = [batch.inputs["input_ids"].shape[1] for batch in Batches(examples, 4, 0, 5, group_by_length=True).epoch(0)]
    assert widths not in (sorted(widths), sorted(widths, reverse=True))


def test_labels_of_texts_and_targets_have_their_own_shape():
    (batch,) = Batches([Tokenized([1, 2], [], "f:0", label=2), Tokenized([3], [], "f:1", label=0)], 2, 9).epoch(0)
    assert batch.inputs["labels"].tolist() == [2, 0]
    assert batch.inputs["input_ids"].tolist() == [[1, 2], [3, 9]]
    (batch,) = Batches([Tokenized([1, 2], [], "f:0", label=0.5)], 2, 9).epoch(0)
    assert batch.inputs["labels"].dtype == torch.float32
    (batch,) = Batches([Tokenized([1], [4, 5, 6], "f:0"), Tokenized([1, 2], [7], "f:1")], 2, 9).epoch(0)
    assert batch.inputs["labels"].tolist() == [[4, 5, 6], [7, IGNORED, IGNORED]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_no_examples_make_no_batches():
    for limits in ({}, {"batch_tokens": 8}, {"row_tokens": 8}):
        batches = Batches([], 2, 0, 1, group_by_length=True, **limits)
        assert batches.count(0) == len(list(batches.epoch(0))) == 0


@pytest.mark.parametrize("name", ["batch_size", "batch_tokens", "row_tokens"])
def test_an_impossible_size_is_refused(name):
    limits: Any = {"batch_size": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        Batches([], pad_id=0, **limits)


def test_an_example_that_fits_into_no_batch_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"f:1 has 9 tokens, more than batch_tokens=8; raise batch_tokens or lower"):
        Batches(made([3, 9, 4]), 1, 0, batch_tokens=8)
    with pytest.raises(ConfigError, match=r"f:0 has 9 tokens, more than batch_tokens=8"):
        Batches(translated([(4, 5), (4, 4)]), 1, 0, batch_tokens=8)
    Batches(made([3, 8, 4]), 1, 0, batch_tokens=8)
