"""Which examples a batch holds: decided from their sizes alone, so that nothing is tokenized for it.

An order is a function of the seed and the epoch's number. It asks no random generator, neither torch's global
one, which a run's evaluations would move, nor a library's, whose stream may change with its version: examples
are sorted by a hash of their number. Everything is arrays, since there may be millions of examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import overload

import numpy as np
from jaxtyping import Int, Shaped

from train.data.packing import fill

POOL = 50  # batches that are sorted by length together


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How examples are put together."""

    batch_size: int = 1
    """Rows in a batch."""
    batch_tokens: int | None = None
    """Tokens in a batch at most, padding included, instead of a number of rows."""
    row_tokens: int | None = None
    """Pack examples into rows of at most so many tokens; by default each is a row."""
    group_by_length: bool = False
    """Put rows of like length together. Packed rows are all about as long."""
    seed: int | None = None
    """Without one the order is the file's, or by length."""


@dataclass(frozen=True, eq=False)
class Order(Sequence[list[list[int]]]):
    """The batches of an epoch, each as its rows, each as the numbers of its examples."""

    examples: Int[np.ndarray, " examples"]
    """All examples, in order."""
    rows: Int[np.ndarray, " rows_and_end"]
    """Where each row begins in `examples`, and the last ends."""
    batches: Int[np.ndarray, " batches_and_end"]
    """Where each batch begins in `rows`, and the last ends."""

    def __len__(self) -> int:
        return len(self.batches) - 1

    @overload
    def __getitem__(self, index: int) -> list[list[int]]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[list[int]]]: ...
    def __getitem__(self, index: int | slice) -> list[list[int]] | list[list[list[int]]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        rows = range(self.batches[index], self.batches[index + 1])
        return [self.examples[self.rows[row] : self.rows[row + 1]].tolist() for row in rows]


def order(sizes: Int[np.ndarray, "examples 2"], rules: Rules, epoch: int) -> Order:
    """Every example once. `sizes` are the tokens of its input and of a target of its own (else 0)."""
    count = len(sizes)
    if not count:
        return Order(np.zeros(0, int), np.zeros(1, int), np.zeros(1, int))
    examples, rows = np.arange(count), np.arange(count + 1)
    if rules.seed is not None:
        examples = shuffled(count, rules.seed, epoch, "examples")
    if rules.row_tokens is not None:
        places, rows = fill(sizes[examples, 0], rules.row_tokens)
        examples = examples[places]
        if rules.seed is not None:  # a pool's rows come longest example first
            places, rows = taken(rows, shuffled(len(rows) - 1, rules.seed, epoch, "rows"))
            examples = examples[places]
    elif rules.group_by_length:
        examples = examples[by_length(sizes[examples], rules)]
    batches = cut(row_sizes(sizes, examples, rows), rules)
    if rules.group_by_length and rules.row_tokens is None and rules.seed is not None:
        places, batches = taken(batches, shuffled(len(batches) - 1, rules.seed, epoch, "batches"))
        examples = examples[places]
    return Order(examples, rows, batches)


def batch_sizes(sizes: Int[np.ndarray, "examples 2"], order: Order) -> Int[np.ndarray, "batches 2"]:
    """The width of each batch, and how many tokens it has, padding included."""
    widths = np.maximum.reduceat(row_sizes(sizes, order.examples, order.rows), order.batches[:-1]).sum(axis=1)
    return np.stack([widths, widths * np.diff(order.batches)], axis=1)


def row_sizes(
    sizes: Int[np.ndarray, "examples 2"], examples: Int[np.ndarray, " taken"], rows: Int[np.ndarray, " rows_and_end"]
) -> Int[np.ndarray, "rows 2"]:
    return np.add.reduceat(sizes[examples].astype(np.int64), rows[:-1])


def by_length(sizes: Int[np.ndarray, "rows 2"], rules: Rules) -> Int[np.ndarray, " rows"]:
    """Rows sorted by length, in pools of some batches, so that a row's company still changes every epoch.

    Every second pool is sorted the other way: a batch that ends one and begins the next has rows of like length.
    """
    pool = len(sizes)
    if rules.seed is not None:
        wanted = rules.batch_size
        if rules.batch_tokens is not None:
            wanted = max(1, round(rules.batch_tokens / sizes.sum(axis=1).mean()))
        pool = POOL * wanted
    pools = np.arange(len(sizes)) // pool
    way = np.where(pools % 2, 1, -1)
    return np.lexsort((way * sizes[:, 1], way * sizes[:, 0], pools))


def cut(sizes: Int[np.ndarray, "rows 2"], rules: Rules) -> Int[np.ndarray, " batches_and_end"]:
    """Where each batch of rows begins, and the last ends."""
    limit = rules.batch_tokens
    if limit is None:
        starts = np.arange(0, len(sizes), rules.batch_size)
        return np.append(starts, len(sizes))
    starts, rows, width, target = [0], 0, 0, 0
    for place, (length, own) in enumerate(zip(sizes[:, 0].tolist(), sizes[:, 1].tolist(), strict=True)):
        rows += 1
        if length > width:  # not max(), which takes most of the time of half a million rows
            width = length
        if own > target:
            target = own
        if rows * (width + target) > limit and rows > 1:
            starts.append(place)
            rows, width, target = 1, length, own
    return np.array([*starts, len(sizes)])


def taken(
    bounds: Int[np.ndarray, " parts_and_end"], parts: Int[np.ndarray, " parts"]
) -> tuple[Int[np.ndarray, " items"], Int[np.ndarray, " parts_and_end"]]:
    """What stands between the bounds, part by part in another order: the places of the items, and the new bounds."""
    lengths = np.diff(bounds)[parts]
    new = np.concatenate([[0], np.cumsum(lengths)])
    return np.repeat(bounds[:-1][parts] - new[:-1], lengths) + np.arange(new[-1]), new


def shuffled(count: int, seed: int, epoch: int, what: str) -> Int[np.ndarray, " count"]:
    """The numbers below `count` in an order that the other arguments decide."""
    start = int.from_bytes(blake2b(f"{seed}/{epoch}/{what}".encode(), digest_size=8).digest(), "little")
    return np.argsort(mixed(np.arange(count, dtype=np.uint64), start), kind="stable")


def mixed(numbers: Shaped[np.ndarray, " count"], start: int) -> Shaped[np.ndarray, " count"]:
    """SplitMix64 (Steele et al., OOPSLA 2014): the numbered values of its stream from `start`."""
    x = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
