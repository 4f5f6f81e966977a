"""Packing: every example once, whole, in rows that are nearly full and number their examples."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ConfigError
from tests.test_train_data import PLAIN, configs
from train.data import load_data
from train.data.batches import IGNORED, Batches, Tokenized
from train.data.packing import POOL, fill, pack

rows = st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=4), min_size=1, max_size=4)


def made(*sizes):
    return [Tokenized([n + 1] * size, [IGNORED] + [n + 1] * (size - 1), f"f:{n}") for n, size in enumerate(sizes)]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), more=st.integers(0, 20))
def test_rows_have_every_example_once_and_are_never_too_long(lengths, more):
    room = max(lengths) + more
    order, bounds = fill(np.array(lengths), room)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert (bounds[0], bounds[-1]) == (0, len(lengths))
    filled = [sum(lengths[i] for i in order[a:b]) for a, b in pairwise(bounds)]
    assert all(0 < total <= room for total in filled)
    # No two rows could have been one, so all but one are more than half full.
    assert sum(2 * total <= room for total in filled) <= 1


def test_an_example_goes_where_it_leaves_the_least_room():
    order, bounds = fill(np.array([3, 6, 4, 7]), 10)
    assert [order[a:b].tolist() for a, b in pairwise(bounds)] == [[3, 0], [1, 2]]


def test_examples_of_different_pools_share_no_row():
    order, bounds = fill(np.full(POOL + 10, 3), 30)
    for a, b in pairwise(bounds):
        assert len({place // POOL for place in order[a:b].tolist()}) == 1


def test_rows_of_realistic_lengths_are_nearly_full():
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(5.0, 0.8, 10_000), 8, 1024).astype(int)
    _, bounds = fill(lengths, 1024)
    assert lengths.sum() / ((len(bounds) - 1) * 1024) > 0.98


@given(rows=rows)
def test_a_packed_batch_holds_the_examples_in_order_and_numbers_them(rows):
    examples = [made(*sizes) for sizes in rows]
    batch = pack(examples, 0)
    for place, row in enumerate(examples):
        numbers = batch["attention_mask"][place]
        for number, e in enumerate(row, 1):
            own = numbers == number
            assert batch["input_ids"][place][own].tolist() == e.input_ids
            assert batch["labels"][place][own].tolist() == e.labels
        there = numbers != 0
        assert (numbers[there].diff() >= 0).all()
        assert (batch["labels"][place][~there] == IGNORED).all()
        assert there.tolist() == sorted(there.tolist(), reverse=True)


def test_the_first_token_of_an_example_is_never_foretold_from_another():
    batch = pack([[Tokenized([1, 2], [1, 2], "f:1"), Tokenized([3, 4], [3, 4], "f:2")]], 0)
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED, 4]]


def test_one_example_a_row_is_a_plain_batch():
    examples = made(5, 3)
    packed = pack([[e] for e in examples], 7)
    (plain,) = Batches(examples, 2, 7).epoch(0)
    assert all(torch.equal(packed[key], plain.inputs[key]) for key in plain.inputs)


@given(seed=st.none() | st.integers(0, 9), batch_size=st.integers(1, 3))
def test_a_packed_batch_says_where_every_example_came_from(seed, batch_size):
    batches = list(Batches(made(*range(2, 20)), batch_size, 0, seed, row_tokens=25).epoch(1))
    for batch in batches:
        assert batch.inputs["input_ids"].shape[1] <= 25
        assert len(batch.where) == int(batch.inputs["attention_mask"].amax(dim=1).sum())
        firsts = [int(name.split(":")[1]) + 1 for name in batch.where]
        ids, numbers = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        begun = (numbers != 0) & (numbers != torch.cat([torch.zeros_like(numbers[:, :1]), numbers[:, :-1]], 1))
        assert ids[begun].tolist() == firsts
    assert sum(batch.tokens for batch in batches) == sum(range(2, 20))


def test_a_row_that_an_example_does_not_fit_into_is_refused():
    with pytest.raises(ConfigError, match="f:1 has 9 tokens, more than row_tokens=8"):
        Batches(made(3, 9), 1, 0, row_tokens=8)


def test_a_target_of_its_own_cannot_be_packed():
    with pytest.raises(ConfigError, match="examples with a target of their own cannot be packed"):
        Batches([Tokenized([1, 2], [3], "f:1")], 1, 0, row_tokens=8)


def test_a_file_is_packed_into_rows_of_max_len(tmp_path):
    path = tmp_path / "my.jsonl"
    records = [{"prompt": f"Say {n}:", "completion": "x" * n} for n in range(1, 30)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    config = configs(path=str(path), max_len=40, pack=True, eval_size=4)
    data = load_data(config, PLAIN)
    batches = list(Batches(data.train, 2, 0, 1, row_tokens=config.max_len).epoch(0))
    assert sorted(where for batch in batches for where in batch.where) == sorted(e.where for e in data.train)
    assert all(batch.inputs["input_ids"].shape[1] <= 40 for batch in batches)
    labels = sum(int((batch.inputs["labels"] != IGNORED).sum()) for batch in batches)
    assert labels == sum(e.label_count for e in data.train)
