"""Requests answered in batches: the longest first, so that too large a batch fails at once and not after an hour.

What is the same is asked once. Each batch's answers go to the cache as they come, so an evaluation that is killed
goes on where it was.

Several processes answer one round of batches after the other, each of them one batch; all of them have to ask the same.
The answers go to all, and the main process alone has a cache.
"""

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from hashlib import sha256
from typing import Any, Literal

from eval.cache import Cache
from eval.examinee import Examinee
from eval.request import Request
from models import DataError
from models.device import is_out_of_memory
from models.parallel import world
from models.parallel.turns import Turns

BatchSize = int | Literal["auto"]
Rows = list[list[Request]]
FIRST = 64  # rows that "auto" begins with
TOKENS = {"cpu": 4096, "cuda": 2**17}  # in a batch of "auto", at most: a larger one gains nothing


def answer_all(
    examinee: Examinee,
    requests: Sequence[Request],
    batch_size: BatchSize = "auto",
    cache: Cache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Any]:
    """The answers, in the order of the requests; `progress` is told how many different ones are done of how many."""
    cache = cache or Cache()
    different = list(dict.fromkeys(requests))
    known = cache.known(examinee.identity, different)
    places = world.from_main({place: known[it] for place, it in enumerate(different) if it in known})
    answers: dict[Request, Any] = {different[place]: answer for place, answer in places.items()}
    for fresh in answered(examinee, [it for it in different if it not in answers], batch_size):
        cache.keep(examinee.identity, fresh)
        answers |= fresh
        if progress is not None:
            progress(len(answers), len(different))
    return [answers[request] for request in requests]


def answered(examinee: Examinee, requests: Sequence[Request], batch_size: BatchSize) -> Iterator[dict[Request, Any]]:
    """Answers batch by batch; with "auto", a batch that memory does not hold is halved, and so are those after it."""
    rows: dict[Hashable, list[Request]] = {}
    for request in requests:
        rows.setdefault((type(request), request.row), []).append(request)
    left = sorted(rows.values(), key=lambda row: (row[0].length, type(row[0]).__name__), reverse=True)
    most = FIRST if batch_size == "auto" else batch_size
    refuse_different(examinee, requests)
    if not left:
        return
    with Turns(examinee.model) as turns:
        while left:
            batches = next_batches(left, most, tokens_at_once(examinee) if batch_size == "auto" else None)
            left = left[sum(map(len, batches)) :]
            mine = batches[world.rank()] if world.rank() < len(batches) else []
            found = turns.gathered(attempt(examinee, mine, batch_size == "auto"))
            for batch, rows_found in zip(batches, found, strict=False):  # the last ones may have had no batch
                if rows_found is None:
                    left, most = batch + left, min(most, len(batch) // 2)
                    continue
                yield {
                    request: answer
                    for row, answers in zip(batch, rows_found, strict=True)
                    for request, answer in zip(row, answers, strict=True)
                }


def refuse_different(examinee: Examinee, requests: Sequence[Request]) -> None:
    """Each process answers what others have asked too, so all of them have to ask the same of the same model."""
    if world.size() > 1:
        asked = json.dumps([examinee.identity, *(request.key for request in requests)])
        if len(set(world.from_all(sha256(asked.encode()).digest()))) > 1:
            raise DataError(
                "the processes do not ask the same of the same model; give them the same checkpoint and data, on every "
                "machine"
            )


def attempt(examinee: Examinee, batch: Rows, may_halve: bool) -> list[list[Any]] | None:
    """The answers to a batch, by rows; None where memory does not hold it and it can be halved."""
    if not batch:
        return []
    try:
        return type(batch[0][0]).answer(examinee, batch)
    except (RuntimeError, MemoryError) as error:
        if not may_halve or len(batch) == 1 or not is_out_of_memory(error):
            raise
    return None  # outside of the handler, whose error still holds the batch's memory


def next_batches(left: Rows, most: int, tokens: int | None) -> list[Rows]:
    """A batch for every process, as far as there are rows."""
    batches: list[Rows] = []
    for _ in range(world.size()):
        if left:
            batches.append(next_batch(left, most, tokens))
            left = left[len(batches[-1]) :]
    return batches


def next_batch(left: Rows, most: int, tokens: int | None) -> Rows:
    """The rows that come first, as many as allowed, all of one kind."""
    kind, longest = type(left[0][0]), max(left[0][0].length, 1)
    if tokens is not None:
        most = max(1, min(most, tokens // longest))
    batch = []
    for row in left[:most]:
        if type(row[0]) is not kind:
            break
        batch.append(row)
    return batch


def tokens_at_once(examinee: Examinee) -> int:
    return TOKENS.get(examinee.model.device.type, TOKENS["cuda"])
