"""The order of batches: every example once an epoch, decided by seed and epoch alone, from any place on."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.data.batches import IGNORED, Batches, Tokenized

# Plain numbers: beartype's checks draw from the global generator, which hypothesis forbids to strategies.
sizes = st.lists(st.integers(2, 9), min_size=1, max_size=30)


def made(sizes):
    return [Tokenized([n + 1] * size, [IGNORED] + [n + 1] * (size - 1), f"f:{n}") for n, size in enumerate(sizes)]


orders = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 7),
        "seed": st.none() | st.integers(0, 2**32),
        "group_by_length": st.booleans(),
    }
)


@given(sizes=sizes, order=orders, epoch=st.integers(0, 3))
def test_an_epoch_has_every_example_once_in_batches_of_a_fixed_size(sizes, order, epoch):
    examples = made(sizes)
    batches = Batches(examples, pad_id=0, **order)
    rows = batches.order(epoch)
    assert sorted(i for row in rows for i in row) == list(range(len(examples)))
    assert len(rows) == batches.count(epoch)
    assert sum(len(row) != order["batch_size"] for row in rows) <= 1


@given(sizes=sizes, order=orders, epoch=st.integers(0, 3))
def test_the_order_asks_and_moves_no_global_random_state(sizes, order, epoch):
    examples = made(sizes)
    before, batches = torch.get_rng_state(), Batches(examples, pad_id=0, **order)
    first = batches.order(epoch)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3), random.random()
    again = Batches(examples, pad_id=0, **order)
    again.order(epoch + 1)  # epochs can be asked for in any order
    assert again.order(epoch) == first


@given(sizes=sizes, order=orders, start=st.integers(0, 35))
def test_starting_at_a_batch_equals_skipping_those_before(sizes, order, start):
    examples = made(sizes)
    batches = Batches(examples, pad_id=0, **order)
    skipped, started = list(batches.epoch(2))[start:], list(batches.epoch(2, start))
    assert len(skipped) == len(started)
    for a, b in zip(skipped, started, strict=True):
        assert all(torch.equal(a.inputs[key], b.inputs[key]) for key in a.inputs)


def test_seeds_and_epochs_change_the_order_and_no_seed_keeps_the_files():
    examples = [Tokenized([1, 1], [IGNORED, 1], "") for _ in range(50)]
    shuffled = [Batches(examples, 5, 0, seed).order(epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({str(order) for order in shuffled}) == 4
    assert Batches(examples, 50, 0).order(3) == [list(range(50))]


@pytest.mark.parametrize("seed", [None, 3])
def test_grouping_by_length_saves_padding(seed):
    draw = random.Random(0)
    examples = [Tokenized([1] * n, [1] * n, "") for n in (draw.randint(2, 100) for _ in range(400))]
    padded = [
        sum(b.inputs["input_ids"].numel() for b in Batches(examples, 8, 0, seed, group_by_length=grouped).epoch(0))
        for grouped in (False, True)
    ]
    real = sum(len(e.input_ids) for e in examples)
    assert padded[1] - real < (padded[0] - real) / 10


def test_grouped_batches_still_mix_differently_every_epoch():
    examples = [Tokenized([1] * (n % 10 + 2), [1] * (n % 10 + 2), "") for n in range(600)]
    batches = Batches(examples, 4, 0, 5, group_by_length=True)
    first, second = ({frozenset(row) for row in batches.order(epoch)} for epoch in (0, 1))
    assert len(first & second) < len(first) / 10


def test_an_impossible_batch_size_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        Batches([], 0, 0)


def test_grouped_batches_come_in_no_order_of_length():
    examples = made(range(2, 202))
    widths = [batch.inputs["input_ids"].shape[1] for batch in Batches(examples, 4, 0, 5, group_by_length=True).epoch(0)]
    assert widths not in (sorted(widths), sorted(widths, reverse=True))
