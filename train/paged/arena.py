"""An arena: one allocation for all of an optimizer's states, and the tensors over it.

The states are made once and live as long as the run, so they share one allocation: one `cudaMallocManaged`, one
`cudaFree`, one address range to prefetch. The tensors are ordinary tensors of the device and may outlive the arena:
`close` takes it out of use at once, and the memory goes with the last tensor that looks into it, whoever kept that.
"""

import ctypes
import math
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

from train.paged.allocation import View, allocate, current, held
from train.paged.cudart import CPU, Advice, Runtime

__all__ = ["Arena", "held"]

ALIGNMENT = 256  # bytes; CUDA promises it of every allocation


class Arena:
    """`nbytes` of managed memory for `device`, or of pinned memory where the device cannot page."""

    def __init__(
        self, nbytes: int, device: torch.device, runtime: Runtime, *, allow_oversubscription: bool = False
    ) -> None:
        if nbytes <= 0:
            raise ValueError(f"an arena's size in bytes must be positive, not {nbytes}")
        if device.type not in ("cuda", "cpu"):
            raise ValueError(f"an arena is for a cuda device, or for the cpu over a stand-in, not for {device}")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # whichever is current later
        self.nbytes, self.device, self.runtime = nbytes, device, runtime
        self._memory = allocate(nbytes, device, runtime, allow_oversubscription=allow_oversubscription)
        weakref.finalize(self, self._memory.close_quietly)
        assert self._memory.pointer % ALIGNMENT == 0, f"{runtime.path} gave memory not aligned to {ALIGNMENT} bytes"

    @property
    def kind(self) -> str:
        """Of memory: managed or pinned."""
        return self._memory.kind

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
        view = View(self._memory)
        over = tensor_on_cuda if self.device.type == "cuda" else tensor_on_cpu
        return over(self._memory.pointer + offset, nbytes, self.device, view).view(dtype).view(tuple(shape))

    def prefetch(self, start: int, stop: int, location: int, stream: int = 0) -> None:
        """Have the pages of bytes start..stop moved to `location` (a device or `CPU`), in the order of `stream`."""
        self._check(start, stop)
        if self.kind == "managed" and start < stop:
            with current(self.device):
                self.runtime.prefetch(self._memory.pointer + start, stop - start, location, stream)

    def advise(self, start: int, stop: int, advice: Advice, location: int) -> None:
        """Tell CUDA what to expect of the pages of bytes start..stop."""
        self._check(start, stop)
        if self.kind == "managed" and start < stop:
            with current(self.device):
                self.runtime.advise(self._memory.pointer + start, stop - start, advice, location)

    def location(self, start: int, stop: int) -> int:
        """Where bytes start..stop were last prefetched to: a device, `CPU`, or `NOWHERE` if not all alike."""
        self._check(start, stop)
        if start == stop:
            raise ValueError(f"a location is that of at least one byte, not of {start}..{stop}")
        if self.kind == "pinned":
            return CPU
        with current(self.device):
            return self.runtime.last_prefetch_location(self._memory.pointer + start, stop - start)

    def close(self) -> None:
        """No more tensors; the memory is freed now, or with the last tensor over it."""
        self._memory.close()

    def _check(self, start: int, stop: int) -> None:
        if self.closed:
            raise ValueError("this arena is closed; an open one is needed")
        if not 0 <= start <= stop <= self.nbytes:
            raise ValueError(f"bytes of this arena are within 0..{self.nbytes}, unlike {start}..{stop}")

    def __enter__(self) -> "Arena":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an arena is memory of this process, neither pickled nor copied: save the state_dict over it")


class CudaArray:
    """Bytes in the form in which Python's CUDA libraries hand arrays to one another."""

    def __init__(self, address: int, nbytes: int, view: View) -> None:
        self.view = view
        self.__cuda_array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (address, False),  # not read-only
            "shape": (nbytes,),
            "typestr": "|u1",
            "strides": None,
            "stream": None,
        }


def tensor_on_cuda(address: int, nbytes: int, device: torch.device, view: View) -> Tensor:
    with current(device):
        tensor = torch.as_tensor(CudaArray(address, nbytes, view), device=device)
    assert tensor.data_ptr() == address, "torch copied the memory that it was to look into"
    return tensor


def tensor_on_cpu(address: int, nbytes: int, device: torch.device, view: View) -> Tensor:
    array: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    array.view = view  # the tensor holds the array, the array the view
    return torch.frombuffer(array, dtype=torch.uint8)
