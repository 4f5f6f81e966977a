"""What paging does on a device: states really managed, results the same bit for bit, and what a step costs.

A hundred MiB of states at most, far below what a device has free: nothing here makes it short of memory. Every claim is
a row with what was found; one that is wrong is a failure. It takes a CUDA device, or a CPU over a stand-in runtime, on
which its own tests run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import interleaved, stopwatch
from train.paged import AdamW, AdamW8bit, Arena, PagedAdamW, PagedAdamW8bit, Paging, Runtime, libraries
from train.paged.arena import held
from train.paged.cudart import CPU
from train.paged.fused import FusedOptimizer

SHAPES = ((4096, 64), (64, 4096)) * 16 + ((1000, 1001),)  # rank-64 adapters of a 7B layer or two: 9.4 M parameters
PAIRS: tuple[tuple[type[AdamW], type[AdamW]], ...] = ((PagedAdamW, AdamW), (PagedAdamW8bit, AdamW8bit))
STEPS = 10
PAGE = 4096
MOST = 0.99  # of pages: what lies in none of a step's ranges but at their edges comes by a fault, when it is touched
MiB = 2**20

Row = dict[str, Any]


def measure(device: str, repeats: int, runtime: Runtime | None = None, shapes: Any = SHAPES) -> dict[str, Any]:
    """Give a row per claim and per timing, and what is wrong."""
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    runtime = runtime or libraries.find()
    paging = Paging(runtime=runtime, window_bytes=16 * MiB)
    before = held(runtime, place.index or 0)
    rows: list[Row] = []
    for paged, unpaged in PAIRS:
        optimizer, other = paged(parameters(shapes, place), paging=paging), unpaged(parameters(shapes, place))
        rows += [{"case": f"{paged.__name__}: {case}", **row} for case, row in claims(optimizer, other, runtime)]
        rows.append(timed(optimizer, other, repeats, place))
        size = optimizer.managed_bytes
        optimizer.close()
        left = held(runtime, place.index or 0) - before
        rows.append({"case": f"{paged.__name__}: {size / MiB:.1f} MiB are freed on close", "holds": left == 0})
    wrong = [row["case"] for row in rows if not row.get("holds", True)]
    return {"rows": rows, "failures": wrong, "runtime": runtime.version}


def claims(optimizer: FusedOptimizer, other: FusedOptimizer, runtime: Runtime) -> list[tuple[str, Row]]:
    """Steps of both, with states sent away and brought back on the way, and what is true of them."""
    train(optimizer, 0, STEPS)
    train(other, 0, STEPS)
    assert optimizer.store is not None
    arena = optimizer.store.memory
    assert isinstance(arena, Arena)
    state = optimizer.state[next(iter(optimizer.state))]["exp_avg"]
    kind = runtime.pointer_kind(state.data_ptr()).kind
    told: list[tuple[str, Row]] = [("states are in managed memory", {"found": kind, "holds": kind == "managed"})]

    device = state.device.index or 0
    for move, expected in ((optimizer.evict, CPU), (optimizer.prefetch, device), (optimizer.evict, CPU)):
        move()
        place = arena.location(0, arena.nbytes)
        told.append((f"{move.__name__} moves them to {expected}", {"found": place, "holds": place == expected}))
    train(optimizer, STEPS, 1)
    train(other, STEPS, 1)
    share = share_at(device, arena)
    told.append((f"a step brings {MOST:.0%} of their pages to the device", {"found": share, "holds": share >= MOST}))
    same = all(map(torch.equal, values(optimizer), values(other)))
    told.append((f"{STEPS + 1} steps are the unpaged one's, bit for bit", {"holds": same}))
    return told


def share_at(place: int, arena: Arena) -> float:
    """The share of an arena's pages that were last prefetched to a place."""
    starts = range(0, arena.nbytes, PAGE)
    return sum(arena.location(at, min(at + PAGE, arena.nbytes)) == place for at in starts) / len(starts)


def timed(optimizer: FusedOptimizer, other: FusedOptimizer, repeats: int, device: torch.device) -> Row:
    """Milliseconds of a step: unpaged, paged with states on the device, and paged after they were sent away."""

    def after_eviction() -> None:
        optimizer.step()

    def seconds(work: Callable[[], object]) -> float:
        if work is after_eviction:
            optimizer.evict()
        synchronize(device)
        return stopwatch(lambda: (work(), synchronize(device)))

    times = interleaved({"paged": optimizer.step, "evicted": after_eviction, "unpaged": other.step}, repeats, seconds)
    row = {f"{name}_ms": 1000 * timing.median for name, timing in times.items()}
    return {
        "case": f"{type(optimizer).__name__}: a step",
        **row,
        "paged_vs_unpaged": row["paged_ms"] / row["unpaged_ms"],
    }


def parameters(shapes: Any, device: torch.device) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def train(optimizer: FusedOptimizer, start: int, steps: int) -> None:
    """Steps on gradients that depend on the step's number alone."""
    for number in range(start, start + steps):
        generator = torch.Generator().manual_seed(number)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        optimizer.step()


def values(optimizer: FusedOptimizer) -> list[Tensor]:
    """Parameters, and states without their paging."""
    states = optimizer.state_dict()["state"].values()
    return [p.cpu() for p in optimizer.param_groups[0]["params"]] + [v.cpu() for s in states for v in s.values()]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
