"""Packing: several short examples in one row, so that hardly a token of a batch is padding.

`attention_mask` numbers the examples of a row 1, 2, 3, ...; a token attends only to tokens with its own number,
and positions count within it, so that what is learned of an example does not depend on its company.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import chain

import numpy as np
from jaxtyping import Int
from torch import Tensor

from train.data.tokenized import IGNORED, Tokenized, padded

POOL = 4096  # examples that are packed together: enough to leave few gaps, few enough to be quick about


def pack(rows: Sequence[Sequence[Tokenized]], pad_id: int) -> dict[str, Int[Tensor, "B T"]]:
    """Rows of examples as one batch, padded on the right; its keys are what model.loss takes.

    The first token of an example is no label: what stands before it belongs to another one.
    """
    ids = [[i for e in row for i in e.input_ids] for row in rows]
    labels = [[label for e in row for label in (IGNORED, *e.labels[1:])] for row in rows]
    numbers = [[number for number, e in enumerate(row, 1) for _ in e.input_ids] for row in rows]
    return {"input_ids": padded(ids, pad_id), "attention_mask": padded(numbers, 0), "labels": padded(labels, IGNORED)}


def fill(
    lengths: Int[np.ndarray, " examples"], room: int
) -> tuple[Int[np.ndarray, " examples"], Int[np.ndarray, " bounds"]]:
    """Which examples go into one row: all of them, row after row, and where each row begins (and the last ends).

    Best fit, longest first, in pools of neighbours: an example goes where it leaves the least room, and a new
    row is begun only if none has room for it. No length may be above `room`.
    """
    rows = [
        row for start in range(0, len(lengths), POOL) for row in fill_pool(lengths[start : start + POOL], room, start)
    ]
    bounds = np.cumsum([0, *map(len, rows)])
    return np.fromiter(chain.from_iterable(rows), np.int64, len(lengths)), bounds


def fill_pool(lengths: Int[np.ndarray, " pool"], room: int, start: int) -> list[list[int]]:
    """The rows of one pool; its examples are numbered from `start`."""
    rows: list[list[int]] = []
    open_rows: list[int] = []  # sorted; the room that is left times POOL, plus the row's number
    least = int(lengths.min())
    by_length = np.argsort(-lengths, kind="stable")
    for place, length in zip((by_length + start).tolist(), lengths[by_length].tolist(), strict=True):
        best = bisect_left(open_rows, length * POOL)
        if best < len(open_rows):
            left, row = divmod(open_rows.pop(best), POOL)
            rows[row].append(place)
        else:
            left, row = room, len(rows)
            rows.append([place])
        if left - length >= least:
            insort(open_rows, (left - length) * POOL + row)
    return rows
