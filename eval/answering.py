"""Requests answered in batches: the longest first, so that too large a batch fails at once and not after an hour.

What is the same is asked once. Each batch's answers go to the cache as they come, so an evaluation that is killed
goes on where it was.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal

from eval.cache import Cache
from eval.examinee import Examinee
from eval.request import Request
from models.device import is_out_of_memory

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
    answers: dict[Request, Any] = cache.known(examinee.identity, different)
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
    while left:
        batch = next_batch(left, most, tokens_at_once(examinee) if batch_size == "auto" else None)
        try:
            found = type(batch[0][0]).answer(examinee, batch)
        except (RuntimeError, MemoryError) as error:
            if batch_size != "auto" or len(batch) == 1 or not is_out_of_memory(error):
                raise
            most = len(batch) // 2
            continue  # outside of the handler, whose error still holds the batch's memory
        left = left[len(batch) :]
        yield {
            request: answer
            for row, answers in zip(batch, found, strict=True)
            for request, answer in zip(row, answers, strict=True)
        }


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
