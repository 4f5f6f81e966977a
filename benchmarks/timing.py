"""Times that can be compared: the contestants take turns within one run, and each is told by its median.

A shared machine is faster in one minute than in the next by a factor of two. Timing one contestant after the
other would give that factor to one of them; in turns, each sees the same minutes. A median forgets the rounds
in which something else took the machine.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over the rounds of a measurement."""

    median: float
    fastest: float
    slowest: float
    repeats: int


def stopwatch(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that one call takes."""
    start = clock()
    work()
    return clock() - start


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    repeats: int,
    seconds: Callable[[Callable[[], object]], float] = stopwatch,
) -> dict[str, Timing]:
    """Time every contestant once in each round, after one call each to warm up.

    `seconds` says how long a call takes, by whatever clock the device needs.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; a median needs at least 1")
    for work in contestants.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, work in contestants.items():
            taken[name].append(seconds(work))
    return {name: Timing(statistics.median(t), min(t), max(t), repeats) for name, t in taken.items()}
