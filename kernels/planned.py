"""Tensors without memory that stand for those of a device, so that a step's memory is known before it is made.

While `standing_for` a kind of device, tensors on "meta" are dispatched as that device's would be, and the wrappers
of C and Triton run as they are: they check, choose and allocate, on "meta" too. Only what they launch does nothing.
So what a plan counts is what the wrappers ask for, and no second list of sizes can go stale.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PROCESSORS = 132  # of the GPU that is planned for, an H100's: it only decides into how many parts small sums are split


class Stand(threading.local):
    kind: str | None = None


stand = Stand()


@contextmanager
def standing_for(kind: str) -> Iterator[None]:
    """A time in which this thread's tensors on "meta" stand for those of a "cpu" or "cuda" device."""
    before, stand.kind = stand.kind, kind
    try:
        if kind == "cuda":
            skip_launches()
        yield
    finally:
        stand.kind = before


def kind_of(device: torch.device) -> str:
    """The type of a device, or of the one that is stood for."""
    return stand.kind if stand.kind is not None and device.type == "meta" else device.type


def in_backward() -> bool:
    """Is this inside a backward pass, such as when a block is computed again?"""
    return torch._C._current_graph_task_id() != -1


def stream_of(device: torch.device) -> int:
    """The stream that is current on a device, by its number.

    Autograd goes through a GPU's backward in a thread of its own. A plan has but one thread and tells them apart here.
    """
    if device.type == "cuda":
        return torch._C._cuda_getCurrentRawStream(device.index)  # a Stream object would take longer to make
    return int(kind_of(device) == "cuda" and in_backward())


def alike(one: torch.device, other: torch.device) -> bool:
    """Are they one device? In a plan, tensors on the CPU are such that were worth giving values, of any device."""
    return one == other or stand.kind is not None


class Unrun:
    """A library of which only questions about the machine are answered; any other function does nothing."""

    QUESTIONS = ("multiplies_bf16", "attends_in_bf16")

    def __init__(self, library: Any) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name) if name in self.QUESTIONS else nothing


def nothing(*_: Any, **__: Any) -> int:
    """What a launch does that is only planned; C functions would give 0 for success."""
    return 0


def skip_launches() -> None:
    """Have Triton's kernels do nothing in a thread that plans. (In all others they go on as before.)"""
    try:
        from triton.runtime.jit import KernelInterface
    except ImportError:  # then there is nothing to launch
        return
    launch = KernelInterface.__getitem__
    if getattr(launch, "plans", False):
        return

    def planned(self: Any, grid: Any) -> Any:
        return nothing if stand.kind is not None else launch(self, grid)

    planned.plans = True  # pyrefly: ignore[missing-attribute]
    KernelInterface.__getitem__ = planned
