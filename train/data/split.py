"""Which examples are held out.

Examples that open alike (one question with several answers, or with its follow-ups) stay together: a model that
has learned an answer to a question is no measure of itself on another one.
"""

import random
from array import array
from collections.abc import Callable

import numpy as np
from jaxtyping import Int, UInt

from models.errors import DataError


def split(
    openings: UInt[np.ndarray, " examples"], size: int | float, seed: int, where: Callable[[int], str]
) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " held_out"]]:
    """The numbers of the examples to train on and of those held out, in the file's order; the seed decides which.

    `openings` are equal where examples open alike. The held-out examples can be fewer than asked for where that
    leaves no group of the right size. `where` names an example's file and line, for a refusal.
    """
    total = len(openings)
    count = round(size * total) if size < 1 else int(size)
    count = max(count, 1) if size else 0
    if count >= total:
        raise DataError(f"data: {total} usable examples cannot give {count} held-out ones; lower data.eval_size")
    _, first, group, members = np.unique(openings, return_index=True, return_inverse=True, return_counts=True)
    order = array("q", np.argsort(first).tobytes())  # groups as they come in the file
    random.Random(seed).shuffle(order)
    chosen, held = np.zeros(len(first), bool), 0
    for number, more in zip(order, array("q", members[order].tobytes()), strict=True):
        if held + more <= count:
            chosen[number] = True
            held += more
    if count and not held:
        raise DataError(
            f"data: no {count} of {total} examples can be held out, since more than that always open "
            f"alike ({where(int(first[order[0]]))} and others); raise data.eval_size, or set it to 0"
        )
    return np.flatnonzero(~chosen[group]), np.flatnonzero(chosen[group])
