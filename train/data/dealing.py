"""Which micro-batches of a step a process takes, so that the step is the same on any number of them.

They are dealt whole and in turn, as cards are: process r of N takes number r, r + N, and so on. What is left for the
last round, fewer micro-batches than processes, is cut by rows: each goes to as many neighbouring processes as the
others do, or one more. So every process makes as many rounds, which is what sharing a model asks of them, and none
ever holds more rows at once than a micro-batch has. A part may have no rows; its round is made all the same.
"""

from typing import NamedTuple


class Deal(NamedTuple):
    """What one process takes in one round."""

    micro_batch: int
    """Its number in the step."""
    part: int = 0
    """Which part of it."""
    parts: int = 1
    """Into how many parts its rows are cut."""


def dealt(count: int, rank: int, size: int) -> list[Deal]:
    """What the process of this rank, of so many, takes of a step's `count` micro-batches: a deal for each round.

    >>> dealt(5, 0, 3)
    [Deal(micro_batch=0, part=0, parts=1), Deal(micro_batch=3, part=0, parts=2)]
    >>> dealt(5, 1, 3)
    [Deal(micro_batch=1, part=0, parts=1), Deal(micro_batch=3, part=1, parts=2)]
    >>> dealt(5, 2, 3)
    [Deal(micro_batch=2, part=0, parts=1), Deal(micro_batch=4, part=0, parts=1)]
    """
    rounds, left = divmod(count, size)
    deals = [Deal(turn * size + rank) for turn in range(rounds)]
    if left:
        which = rank * left // size
        first, end = -(-which * size // left), -(-(which + 1) * size // left)  # the processes that share it
        deals.append(Deal(rounds * size + which, rank - first, end - first))
    return deals
