"""Batches dealt to several processes in rounds, as cards are: each round one for every process.

A batch is the same whatever the number of processes, so what is computed of it is as well.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from models.parallel import world

T = TypeVar("T")


def dealt(batches: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """This process's batch of every round, and whether it counts.

    In a last round of fewer batches than processes those without one get the first, which does not count: a shared
    model is run by all or by none. All processes have to give the same batches.
    """
    batches = iter(batches)
    while this := list(islice(batches, world.size())):
        counts = world.rank() < len(this)
        yield this[world.rank() if counts else 0], counts


def in_order(parts: Sequence[Sequence[T]]) -> list[T]:
    """What each process has made of its part, in the order in which that was dealt.

    >>> in_order([["a", "c", "e"], ["b", "d"]])
    ['a', 'b', 'c', 'd', 'e']
    """
    rounds = max(map(len, parts))
    return [part[number] for number in range(rounds) for part in parts if number < len(part)]
