"""What a step really takes on a CPU: every allocation of torch, as its own profiler records them.

This knows nothing of the simulation: the events come from the allocator, from inside operators too, and the model
has real, random weights.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch._C._profiler import _ExtraFields_Allocation

from train.planner.layers import with_layers
from train.planner.simulation import own_workspaces
from train.planner.step import Job, prepared, steps_taken

MARK = "what is measured"

T = TypeVar("T")


def measured_peak(job: Job, device: str = "cpu", tries: int = 1) -> int:
    """The most bytes of tensors that were there at once during two steps, the model's own among them.

    A step of one block before that makes the tables that stay in the process, and which no step makes again. On a CPU
    it is the least of several `tries`: several processes have threads that may let go of a tensor late, or may not.
    """
    small = replace(job, raw=with_layers(job.raw, 1), max_len=8, target_len=8, accumulation=1)
    with own_workspaces():
        steps_taken(prepared(small, torch.device(device)))
    with own_workspaces():
        return peak_of_tensors(job, torch.device(device), tries)


def peak_of_tensors(job: Job, device: torch.device, tries: int) -> int:
    if device.type == "cuda":
        gc.collect()  # what earlier steps left in cycles would otherwise go in the middle of this one
        before = torch.cuda.memory_allocated(device)
        stepper = prepared(job, device)
        torch.cuda.reset_peak_memory_stats(device)
        steps_taken(stepper)
        return torch.cuda.max_memory_allocated(device) - before

    return allocated_at_once(lambda: prepared(job, device), steps_taken, tries)


def allocated_at_once(prepare: Callable[[], T], work: Callable[[T], object], tries: int = 1) -> int:
    """The most bytes on a CPU that were there at once while `work` was done, of what both have allocated.

    They are the allocator's own sums: what a thread of gloo's frees is an event of no thread that is profiled.
    """
    gc.collect()  # so that nothing from before goes in between
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = prepare()
        for _ in range(tries):
            with torch.profiler.record_function(MARK):
                work(made)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = sorted(flat(profiler.profiler.kineto_results.experimental_event_tree()), key=lambda e: e.start_time_ns)
    marks = [(event.start_time_ns, event.end_time_ns) for event in events if event.name == MARK]
    totals = [(e.start_time_ns, e.extra_fields.total_allocated) for e in events if is_memory(e)]
    before = next(e.extra_fields.total_allocated - e.extra_fields.alloc_size for e in events if is_memory(e))
    peaks = [max(total for time, total in totals if start <= time <= end) for start, end in marks]
    return min(peaks) - before


def is_memory(event: Any) -> bool:
    return isinstance(event.extra_fields, _ExtraFields_Allocation)


def flat(events: Iterable[Any]) -> Iterator[Any]:
    """All events of a tree."""
    for event in events:
        yield event
        yield from flat(event.children)
