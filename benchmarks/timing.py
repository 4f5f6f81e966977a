"""Times that can be compared: the contestants take turns within one run, and each is told by its median.

A shared machine is faster in one minute than in the next by a factor of two. Timing one contestant after the
other would give that factor to one of them; in turns, each sees the same minutes. A median forgets the rounds
in which something else took the machine.

On a GPU a product of few tokens is over in microseconds, faster than Python can ask for the next one, and a weight
that was just read is still in the cache. So there a contestant is a rotation over copies of its weight, larger
together than the cache, recorded once as a CUDA graph and replayed between two events.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over the rounds of a measurement."""

    median: float
    fastest: float
    slowest: float
    repeats: int


@dataclass(frozen=True)
class Rotation:
    """The same call on one copy of its operands after the other."""

    calls: Sequence[Callable[[], object]]

    def __call__(self) -> list[object]:
        """Every call once; the results live until all are there, so that each is written to memory of its own."""
        return [call() for call in self.calls]


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
    """Time every contestant once in each round, after one call each to warm up; of a rotation, one of its calls.

    `seconds` says how long the work takes, by whatever clock the device needs.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; a median needs at least 1")
    for work in contestants.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, work in contestants.items():
            calls = len(work.calls) if isinstance(work, Rotation) else 1
            taken[name].append(seconds(work) / calls)
    return {name: Timing(statistics.median(t), min(t), max(t), repeats) for name, t in taken.items()}


class GraphClock:
    """Seconds of work on a GPU, by events around replays of its graph; what cannot be recorded is called as it is."""

    def __init__(self, replays: int = 10, record: bool = True) -> None:
        self.replays, self.record = replays, record
        self.recorded: dict[int, Any] = {}

    def __call__(self, work: Callable[[], object]) -> float:
        if id(work) not in self.recorded:
            self.recorded[id(work)] = (graph_of(work) if self.record else work, work)
        run, _ = self.recorded[id(work)]
        run()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(self.replays):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / self.replays


def graph_of(work: Callable[[], object]) -> Callable[[], object]:
    """The work as a CUDA graph, recorded on a stream of its own as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes: far more than any cache holds
SIDE = {"cpu": 2048, "cuda": 8192}  # of a square product that keeps every unit busy


def clock_of(device: str) -> Callable[[Callable[[], object]], float]:
    """How long a work of many milliseconds takes on a device."""
    return stopwatch if torch.device(device).type == "cpu" else GraphClock(record=False)


def copy_bandwidth(device: str, repeats: int, nbytes: int | None = None) -> float:
    """Bytes read and written in a second when one large tensor is copied: what little beats that reads memory."""
    size = nbytes or COPIED[torch.device(device).type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)  # written once, so that the system has given every page
    timing = interleaved({"copy": lambda: target.copy_(source)}, repeats, clock_of(device))
    return 2 * size / timing["copy"].fastest


def product_speed(device: str, dtype: torch.dtype, repeats: int, side: int | None = None) -> float:
    """Operations in a second of torch's product of two large square matrices."""
    n = side or SIDE[torch.device(device).type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    timing = interleaved({"product": lambda: torch.mm(a, b, out=out)}, repeats, clock_of(device))
    return 2 * n**3 / timing["product"].fastest
