"""One allocation of managed memory, freed exactly once: when its owner has closed it and nobody looks into it any more.

torch does not count what CUDA gave behind its back, so each tensor over the memory holds a `View`, and the last of
owner and views to go frees it, in whichever thread. A forked child inherits the objects but not the memory, and frees
nothing. What the process holds is counted, and more than the device has free is refused: states that cannot be
resident together move over the bus at every step.

Where the device cannot move pages on demand (Windows, WSL, GPUs before Pascal), managed memory would have no point: it
cannot be prefetched or evicted, and the CPU may not even look at it while a kernel runs. There the memory is pinned
host memory, which the GPU reads and writes over the bus.
"""

import logging
import os
import threading
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from train.paged.cudart import NOT_SUPPORTED, CudaError, DeviceAttribute, Runtime

MiB = 2**20

log = logging.getLogger(__name__)


class OversubscriptionError(torch.OutOfMemoryError):
    """More managed memory than the device could hold at once, and nobody allowed that."""


def allocate(nbytes: int, device: torch.device, runtime: Runtime, *, allow_oversubscription: bool) -> "Allocation":
    """Managed memory if the device can page it, else pinned memory. After an error nothing is held."""
    with current(device):
        if not pages_on_demand(runtime, device.index or 0):
            return pinned(nbytes, device, runtime, "it cannot move managed pages on demand")
        reserve(nbytes, device, runtime, allow_oversubscription)
        try:
            return Allocation(runtime.malloc_managed(nbytes), nbytes, "managed", device, runtime)
        except BaseException as error:
            count(runtime, device, -nbytes)
            if isinstance(error, CudaError) and error.code == NOT_SUPPORTED:
                return pinned(nbytes, device, runtime, str(error))
            raise


def held(runtime: Runtime, device_index: int) -> int:
    """Bytes of managed memory that this process holds on a device."""
    with _lock:
        return _held[runtime.path, device_index]


class Allocation:
    """Memory at `pointer` (0 once it is freed) of a kind: managed or pinned."""

    def __init__(self, pointer: int, nbytes: int, kind: str, device: torch.device, runtime: Runtime) -> None:
        self.pointer, self.nbytes, self.kind = pointer, nbytes, kind
        self.device, self.runtime = device, runtime
        self.closed, self.views, self.process = False, 0, os.getpid()

    def close(self) -> None:
        """No more views; the memory is freed now, or with the last of them. After an error it can be tried again."""
        with _lock:  # taken out under the lock and freed outside it: one thread frees, none waits for CUDA
            self.closed = True
            pointer, self.pointer = (0, self.pointer) if self.views else (self.pointer, 0)
        if not pointer or os.getpid() != self.process:  # a forked child does not have the memory
            return
        try:
            with current(self.device):
                self.runtime.synchronize()  # cudaFree may, but need not, wait for kernels that still use the memory
                (self.runtime.free if self.kind == "managed" else self.runtime.free_host)(pointer)
        except BaseException:
            self.pointer = pointer
            raise
        if self.kind == "managed":
            count(self.runtime, self.device, -self.nbytes)

    def close_quietly(self) -> None:
        """As `close`, where nobody is there to catch an error: in a finalizer."""
        try:
            self.close()
        except RuntimeError as error:  # CUDA's, or torch's if an earlier kernel has broken the device
            log.error("%s memory of %d bytes could not be freed: %s", self.kind, self.nbytes, error)


class View:
    """A tensor's hold on an allocation, for as long as the tensor's storage lives."""

    def __init__(self, allocation: Allocation) -> None:
        with _lock:
            if allocation.closed:
                raise ValueError("this memory is closed to new tensors; open memory is needed")
            allocation.views += 1
        self.allocation = allocation

    def __del__(self) -> None:
        allocation: Allocation | None = getattr(self, "allocation", None)  # None if the memory was closed
        if allocation is None:
            return
        with _lock:
            allocation.views -= 1
            last = allocation.closed and not allocation.views
        if last:
            allocation.close_quietly()


def pages_on_demand(runtime: Runtime, device_index: int) -> bool:
    needed = DeviceAttribute.MANAGED_MEMORY, DeviceAttribute.CONCURRENT_MANAGED_ACCESS
    return all(runtime.device_attribute(attribute, device_index) == 1 for attribute in needed)


def reserve(nbytes: int, device: torch.device, runtime: Runtime, allow_oversubscription: bool) -> None:
    """Count `nbytes` as held, unless that is more than the device has free."""
    free, _ = runtime.memory_info()
    with _lock:
        before = held(runtime, device.index or 0)
        fits = before + nbytes <= free
        if fits or allow_oversubscription:
            count(runtime, device, nbytes)
    if fits:
        return
    figures = (
        f"{nbytes / MiB:,.1f} MiB of managed memory, with {before / MiB:,.1f} MiB held already, "
        f"exceed the {free / MiB:,.1f} MiB free on device {device.index or 0}"
    )
    if not allow_oversubscription:
        raise OversubscriptionError(
            f"{figures}: free some there, take 8-bit states, or pass allow_oversubscription=True"
        )
    log.warning("%s: what does not fit moves over the bus at every step, which makes steps many times slower", figures)


def count(runtime: Runtime, device: torch.device, nbytes: int) -> None:
    with _lock:
        _held[runtime.path, device.index or 0] += nbytes


def pinned(nbytes: int, device: torch.device, runtime: Runtime, reason: str) -> Allocation:
    key = runtime.path, device.index or 0
    with _lock:
        first = key not in _told
        _told.add(key)
    if first:
        log.warning("pinned host memory instead of managed memory for device %d: %s", device.index or 0, reason)
    return Allocation(runtime.malloc_host(nbytes), nbytes, "pinned", device, runtime)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one. A CPU in its place, over a stand-in runtime, counts as device 0."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_lock = threading.RLock()  # reentrant: a garbage collection may end a view while this thread holds it
_held: Counter[tuple[str, int]] = Counter()  # by the runtime's path and the device
_told: set[tuple[str, int]] = set()  # devices whose pinned memory was logged


def start_anew() -> None:
    """In a forked child: it holds nothing, and the thread that held the lock is not there to let go of it."""
    global _lock
    _lock = threading.RLock()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=start_anew)
