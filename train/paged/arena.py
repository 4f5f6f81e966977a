"""One allocation of managed memory, with tensors over it and an end that is known.

An optimizer's states are made once and live as long as the run, so they share one allocation: one `cudaMallocManaged`,
one `cudaFree`, and one range to prefetch. The tensors over it are ordinary tensors of the device. Memory that CUDA gave
is not torch's to count, so each tensor holds on to it: `close` takes the arena out of use at once, and the memory goes
back with the last tensor that looks into it, whoever kept that. A forked child never frees what its parent holds.

Where the device cannot move pages on demand (Windows, WSL, GPUs before Pascal), managed memory would have no point: it
cannot be prefetched or evicted, and the CPU may not even look at it while a kernel runs. There the arena is pinned host
memory, which the GPU reads and writes over the bus.
"""

import ctypes
import logging
import math
import os
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from train.paged.cudart import CPU, NOT_SUPPORTED, Advice, CudaError, DeviceAttribute, Runtime

ALIGNMENT = 256  # bytes; CUDA promises it of every allocation
MiB = 2**20

log = logging.getLogger(__name__)


class Arena:
    """`nbytes` of managed memory on `device`, or of pinned memory where the device cannot page."""

    def __init__(
        self, nbytes: int, device: torch.device, runtime: Runtime, *, allow_oversubscription: bool = False
    ) -> None:
        if nbytes <= 0:
            raise ValueError(f"an arena's size in bytes must be positive, not {nbytes}")
        self.nbytes, self.device, self.runtime = nbytes, device, runtime
        self._memory = allocate(nbytes, device, runtime, allow_oversubscription)
        self._finalizer = weakref.finalize(self, self._memory.close_quietly)
        assert self._memory.pointer % ALIGNMENT == 0, f"{runtime.path} gave memory that is not aligned to {ALIGNMENT}"

    @property
    def kind(self) -> str:
        """ "managed" or "pinned"."""
        return "managed" if self._memory.managed else "pinned"

    @property
    def closed(self) -> bool:
        return self._memory.closed

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor over the memory from `offset` on, holding whatever is there."""
        if offset % dtype.itemsize:
            raise ValueError(f"a tensor of {dtype} starts at a multiple of {dtype.itemsize} bytes, not at {offset}")
        if any(size < 0 for size in shape):
            raise ValueError(f"a shape has no negative sizes, unlike {tuple(shape)}")
        nbytes = math.prod(shape) * dtype.itemsize
        self._check(offset, offset + nbytes)
        if nbytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        address = self._memory.pointer + offset
        over = tensor_on_cuda if self.device.type == "cuda" else tensor_on_cpu
        return over(address, nbytes, self.device, View(self._memory)).view(dtype).view(tuple(shape))

    def prefetch(self, start: int, stop: int, location: int, stream: int = 0) -> None:
        """Have the pages of bytes start..stop moved to `location` (a device or `CPU`), in the order of `stream`."""
        self._check(start, stop)
        if self._memory.managed and start < stop:
            with current(self.device):
                self.runtime.prefetch(self._memory.pointer + start, stop - start, location, stream)

    def advise(self, start: int, stop: int, advice: Advice, location: int) -> None:
        """Tell CUDA what to expect of the pages of bytes start..stop."""
        self._check(start, stop)
        if self._memory.managed and start < stop:
            with current(self.device):
                self.runtime.advise(self._memory.pointer + start, stop - start, advice, location)

    def location(self, start: int, stop: int) -> int:
        """Where bytes start..stop were last prefetched to: a device, `CPU`, or `NOWHERE` if not all alike."""
        self._check(start, stop)
        if start == stop:
            raise ValueError(f"a location is that of at least one byte, not of {start}..{stop}")
        if not self._memory.managed:
            return CPU
        with current(self.device):
            return self.runtime.last_prefetch_location(self._memory.pointer + start, stop - start)

    def close(self) -> None:
        """No more tensors; the memory is given back now, or with the last tensor over it."""
        self._memory.close()

    def _check(self, start: int, stop: int) -> None:
        if self.closed:
            raise ValueError("this arena is closed; an open one is needed")
        if not 0 <= start <= stop <= self.nbytes:
            raise ValueError(f"bytes of this arena are within 0..{self.nbytes}, unlike {start}..{stop}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an arena is memory of this process and is neither pickled nor copied: use its state_dict")


class Memory:
    """The allocation itself: freed once, by whoever is last of the arena and the views."""

    def __init__(self, pointer: int, nbytes: int, managed: bool, device: torch.device, runtime: Runtime) -> None:
        self.pointer, self.nbytes, self.managed = pointer, nbytes, managed  # the pointer is 0 once freed
        self.device, self.runtime = device, runtime
        self.closed, self.views, self.process = False, 0, os.getpid()

    def close(self) -> None:
        with _lock:
            self.closed = True
        self.free_if_unused()

    def close_quietly(self) -> None:
        """As `close`, where nobody is there to catch an error: in a finalizer."""
        try:
            self.close()
        except CudaError as error:
            log.error("the %s memory of an arena could not be freed: %s", "managed" if self.managed else "pinned", error)

    def free_if_unused(self) -> None:
        """Free the memory if the arena is closed and no view is left. After an error it is held as before."""
        if os.getpid() != self.process:
            return
        with _lock:  # taken out under the lock and freed outside it: one thread frees, none waits for CUDA
            pointer = 0 if self.views or not self.closed else self.pointer
            if not pointer:
                return
            self.pointer = 0
        try:
            with current(self.device):
                self.runtime.synchronize()  # kernels that were launched may still use it
                (self.runtime.free if self.managed else self.runtime.free_host)(pointer)
        except BaseException:
            self.pointer = pointer
            raise
        if self.managed:
            count(self.runtime, self.device, -self.nbytes)


class View:
    """A tensor's hold on the memory, for as long as the tensor's storage lives."""

    def __init__(self, memory: Memory) -> None:
        with _lock:
            if memory.closed:
                raise ValueError("this arena is closed; an open one is needed")
            memory.views += 1
        self.memory = memory

    def __del__(self) -> None:
        memory = getattr(self, "memory", None)  # missing if the arena refused
        if memory is not None and os.getpid() == memory.process:
            with _lock:
                memory.views -= 1
                unused = memory.closed and not memory.views
            if unused:
                memory.close_quietly()


class CudaArray:
    """Bytes in the form in which CUDA libraries of Python hand arrays to one another."""

    def __init__(self, address: int, nbytes: int, view: View) -> None:
        self.view = view
        self.__cuda_array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (address, False),  # writable
            "shape": (nbytes,),
            "typestr": "|u1",
            "strides": None,
            "stream": None,
        }


def tensor_on_cuda(address: int, nbytes: int, device: torch.device, view: View) -> Tensor:
    with current(device):
        tensor = torch.as_tensor(CudaArray(address, nbytes, view), device=device)
    assert tensor.data_ptr() == address, "torch copied the memory it was to look into"
    return tensor


def tensor_on_cpu(address: int, nbytes: int, device: torch.device, view: View) -> Tensor:
    array = (ctypes.c_uint8 * nbytes).from_address(address)
    array.view = view  # the tensor holds the array, the array the view
    return torch.frombuffer(array, dtype=torch.uint8)


def allocate(nbytes: int, device: torch.device, runtime: Runtime, allow_oversubscription: bool) -> Memory:
    """Managed memory if the device can page it, else pinned memory. After an error nothing is held."""
    with current(device):
        if not pages_on_demand(runtime, index(device)):
            return pinned(nbytes, device, runtime, "it cannot move managed pages on demand")
        reserve(nbytes, device, runtime, allow_oversubscription)
        try:
            return Memory(runtime.malloc_managed(nbytes), nbytes, True, device, runtime)
        except BaseException as error:
            count(runtime, device, -nbytes)
            if isinstance(error, CudaError) and error.code == NOT_SUPPORTED:
                return pinned(nbytes, device, runtime, str(error))
            raise


def pages_on_demand(runtime: Runtime, device_index: int) -> bool:
    needed = DeviceAttribute.MANAGED_MEMORY, DeviceAttribute.CONCURRENT_MANAGED_ACCESS
    return all(runtime.device_attribute(attribute, device_index) == 1 for attribute in needed)


def pinned(nbytes: int, device: torch.device, runtime: Runtime, reason: str) -> Memory:
    with _lock:
        told, _ = (runtime.path, index(device)) in _told_pinned, _told_pinned.add((runtime.path, index(device)))
    if not told:
        log.warning("device %s gets pinned host memory where managed memory was wanted: %s", index(device), reason)
    return Memory(runtime.malloc_host(nbytes), nbytes, False, device, runtime)


def reserve(nbytes: int, device: torch.device, runtime: Runtime, allow_oversubscription: bool) -> None:
    """Count `nbytes` as held, unless that is more than the device has free."""
    free, _ = runtime.memory_info()
    with _lock:
        before = held(runtime, index(device))
        fits = before + nbytes <= free
        if fits or allow_oversubscription:
            count(runtime, device, nbytes)
    if fits:
        return
    figures = (
        f"an arena of {nbytes / MiB:,.1f} MiB, with {before / MiB:,.1f} MiB of managed memory held already, "
        f"exceeds the {free / MiB:,.1f} MiB free on device {index(device)}"
    )
    if not allow_oversubscription:
        raise RuntimeError(
            f"{figures}: free memory there, take smaller states (8 bit), or pass allow_oversubscription=True"
        )
    log.warning("%s: what does not fit moves over the bus at every step, which is many times slower", figures)


def held(runtime: Runtime, device_index: int) -> int:
    """Bytes of managed memory that this process's arenas hold on a device."""
    with _lock:
        return _held[runtime.path, device_index]


def count(runtime: Runtime, device: torch.device, nbytes: int) -> None:
    with _lock:
        _held[runtime.path, index(device)] += nbytes


def index(device: torch.device) -> int:
    """The number of a CUDA device. A CPU in its place is how the tests run, and counts as device 0."""
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if device.type == "cuda" else 0


def current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_lock = threading.RLock()  # reentrant: a collection may end a view while this thread holds it
_held: Counter[tuple[str, int]] = Counter()
_told_pinned: set[tuple[str, int]] = set()


def start_anew() -> None:
    """In a forked child: nothing is held there, and nobody is left to let go of the lock."""
    global _lock
    _lock = threading.RLock()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=start_anew)
