"""What a step really takes on a CPU: every allocation of torch, as its own profiler records them.

This knows nothing of the simulation: the events come from the allocator, from inside operators too, and the model
has real, random weights.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from train.planner.layers import with_layers
from train.planner.simulation import own_workspaces
from train.planner.step import Job, prepared, steps_taken

MARK = "what is measured"

T = TypeVar("T")


def measured_peak(job: Job, device: str = "cpu") -> int:
    """The most bytes of tensors that were there at once during two steps, the model's own among them.

    A step of one block before that makes the tables that stay in the process, and which no step makes again.
    """
    small = replace(job, raw=with_layers(job.raw, 1), max_len=8, target_len=8, accumulation=1)
    with own_workspaces():
        steps_taken(prepared(small, torch.device(device)), 1)
    with own_workspaces():
        return peak_of_tensors(job, torch.device(device))


def peak_of_tensors(job: Job, device: torch.device) -> int:
    if device.type == "cuda":
        gc.collect()  # what earlier steps left in cycles would otherwise go in the middle of this one
        before = torch.cuda.memory_allocated(device)
        stepper = prepared(job, device)
        torch.cuda.reset_peak_memory_stats(device)
        steps_taken(stepper, job.accumulation)
        return torch.cuda.max_memory_allocated(device) - before

    return allocated_at_once(lambda: prepared(job, device), lambda stepper: steps_taken(stepper, job.accumulation))


def allocated_at_once(prepare: Callable[[], T], work: Callable[[T], object]) -> int:
    """The most bytes on a CPU that were there at once while `work` was done, of what both have allocated."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = prepare()
        with torch.profiler.record_function(MARK):
            work(made)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    (start,) = [event.start_ns() for event in events if event.name() == MARK]
    now = peak = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()  # pyrefly: ignore[missing-attribute]
            if event.start_ns() >= start:
                peak = max(peak, now)
    return peak
