"""Searching for a better table of launches on the GPU at hand: `qlora bench kernels --tune`.

A module of `kernels` that wants to be searched has `candidates()`, the launches worth trying by the row of the table
they would stand in, and `trial(row, launch)`, which gives a call that runs the kernel so on a typical problem.
Nothing is changed here: the table that comes out is for a person, who puts what is better in the kernel's file.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kernels.launch import Launch

if TYPE_CHECKING:
    from rich.table import Table

WARM_UP, REPEATS = 3, 15
CACHE_BYTES = 256 << 20  # written between two runs, so that no run finds its operands in the cache


@dataclass(frozen=True)
class Timing:
    """How long a kernel took in one configuration."""

    row: str
    launch: Launch
    microseconds: float
    """The median of the repeats; infinite where it does not run, as when it takes too much shared memory."""


def tune(module: Any) -> list[Timing]:
    """Every candidate of a module of `kernels`, timed; row by row, the fastest first."""
    require_gpu()
    found = []
    for row, launches in module.candidates().items():
        found += search(row, launches, lambda launch, row=row: module.trial(row, launch))
    return found


def search(row: str, launches: Iterable[Launch], trial: Callable[[Launch], Callable[[], object]]) -> list[Timing]:
    """The launches for one row, the fastest first. `trial` gives what is to be timed for a launch."""
    require_gpu()
    timings = [Timing(row, launch, median_time(trial(launch))) for launch in launches]
    return sorted(timings, key=lambda timing: timing.microseconds)


def median_time(run: Callable[[], object]) -> float:
    """Microseconds of a run on the GPU."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    try:
        for _ in range(WARM_UP):
            run()
        for _ in range(REPEATS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times.append(1000 * start.elapsed_time(stop))
    except Exception as error:
        if type(error).__name__ not in ("OutOfResources", "PTXASError"):
            raise
        return float("inf")
    return statistics.median(times)


def table(timings: Iterable[Timing]) -> "Table":
    """The timings as a table for a person, the best of each row in bold."""
    from rich.table import Table

    table, seen = Table("row", "constants", "warps", "stages", "microseconds"), set()
    for timing in timings:
        launch = timing.launch
        constants = ", ".join(f"{name} {value}" for name, value in launch.constants.items())
        cells = (timing.row, constants, str(launch.num_warps), str(launch.num_stages), f"{timing.microseconds:.1f}")
        table.add_row(*cells, style=None if timing.row in seen else "bold")
        seen.add(timing.row)
    return table


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("tuning times kernels where they run, and torch sees no CUDA GPU here")
