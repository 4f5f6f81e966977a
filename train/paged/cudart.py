"""The CUDA runtime as this project uses it: sixteen C functions, typed, and every answer checked.

torch offers no managed memory, so the calls that allocate, place and free it go to the runtime library itself,
through ctypes. A call that fails raises `CudaError` with the call, its size and CUDA's own text, and clears the error
that the library keeps for the thread, so that torch does not report ours at its next kernel. Nothing here ends the
process. Two functions changed their signature in CUDA 13 (a location by value where a device number was), which the
version of the library decides.
"""

import ctypes
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch

CPU = -1  # cudaCpuDeviceId: the host, wherever a location is asked for
NOWHERE = -2  # cudaInvalidDeviceId: no location, or pages that differ
ATTACH_GLOBAL = 1  # cudaMemAttachGlobal: any stream on any device may use the memory
OUT_OF_MEMORY, NOT_SUPPORTED = 2, 801  # cudaErrorMemoryAllocation, cudaErrorNotSupported

PREFERRED_LOCATION, LAST_PREFETCH_LOCATION = 2, 4  # cudaMemRangeAttribute
LOCATED_ON_DEVICE, LOCATED_ON_HOST = 1, 2  # cudaMemLocationType
KINDS = ("unregistered", "host", "device", "managed")  # cudaMemoryType, in its order


class Advice(IntEnum):
    """cudaMemoryAdvise: what to expect of a range of managed memory."""

    SET_READ_MOSTLY = 1
    UNSET_READ_MOSTLY = 2
    SET_PREFERRED_LOCATION = 3
    UNSET_PREFERRED_LOCATION = 4
    SET_ACCESSED_BY = 5
    UNSET_ACCESSED_BY = 6


class DeviceAttribute(IntEnum):
    """cudaDeviceAttr, as far as managed memory asks for it."""

    MANAGED_MEMORY = 83
    CONCURRENT_MANAGED_ACCESS = 89


class PointerAttributes(NamedTuple):
    """What CUDA knows of an address: managed, host, device or unregistered memory, and whose."""

    kind: str
    device: int


class CudaError(RuntimeError):
    """A call that the CUDA runtime answered with an error."""

    def __init__(self, call: str, code: int, name: str, text: str, nbytes: int | None = None) -> None:
        super().__init__(call, code, name, text, nbytes)  # as given, so that it can be pickled
        self.call, self.code, self.name, self.text, self.nbytes = call, code, name, text, nbytes

    def __str__(self) -> str:
        size = "" if self.nbytes is None else f"({self.nbytes:,} bytes)"
        return f"{self.call}{size} failed: {self.text} ({self.name}, {self.code})"


class CudaOutOfMemoryError(CudaError, torch.OutOfMemoryError):
    """One that says that memory ran out; it is torch's error too, for those who wait for that."""


class Location(ctypes.Structure):
    """cudaMemLocation."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class Attributes(ctypes.Structure):
    """cudaPointerAttributes. CUDA 13 appended 64 bytes to it, hence the room at the end."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("device", ctypes.c_int),
        ("device_pointer", ctypes.c_void_p),
        ("host_pointer", ctypes.c_void_p),
        ("room", ctypes.c_byte * 128),
    ]


P, N, I, U = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint  # noqa: E741
OUT_P, OUT_N, OUT_I = ctypes.POINTER(P), ctypes.POINTER(N), ctypes.POINTER(I)
SIGNATURES = {
    "cudaMallocManaged": (I, OUT_P, N, U),
    "cudaFree": (I, P),
    "cudaMallocHost": (I, OUT_P, N),
    "cudaFreeHost": (I, P),
    "cudaMemRangeGetAttribute": (I, P, N, I, P, N),
    "cudaPointerGetAttributes": (I, ctypes.POINTER(Attributes), P),
    "cudaMemGetInfo": (I, OUT_N, OUT_N),
    "cudaDeviceGetAttribute": (I, OUT_I, I, I),
    "cudaRuntimeGetVersion": (I, OUT_I),
    "cudaStreamSynchronize": (I, P),
    "cudaDeviceSynchronize": (I,),
    "cudaGetLastError": (I,),
    "cudaGetErrorName": (ctypes.c_char_p, I),
    "cudaGetErrorString": (ctypes.c_char_p, I),
}
PLACED_BY_NUMBER = {"cudaMemPrefetchAsync": (I, P, N, I, P), "cudaMemAdvise": (I, P, N, I, I)}  # before CUDA 13
PLACED_BY_LOCATION = {"cudaMemPrefetchAsync": (I, P, N, Location, U, P), "cudaMemAdvise": (I, P, N, I, Location)}


class Runtime:
    """A CUDA runtime library. Addresses are ints, sizes bytes, a location a device number or `CPU`."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            self._library = ctypes.CDLL(self.path)
        except OSError as error:
            raise RuntimeError(f"the CUDA runtime library {self.path} cannot be loaded: {error}") from error
        self._declare(SIGNATURES)
        version = I()
        self._call("cudaRuntimeGetVersion", version)
        self.version = version.value  # 13050 is 13.5
        self._by_number = self.version < 13000
        self._declare(PLACED_BY_NUMBER if self._by_number else PLACED_BY_LOCATION)

    def malloc_managed(self, nbytes: int) -> int:
        """Address of new managed memory, with whatever was in it."""
        return self._malloc("cudaMallocManaged", nbytes, ATTACH_GLOBAL)

    def free(self, pointer: int) -> None:
        self._call("cudaFree", addressed(pointer))

    def malloc_host(self, nbytes: int) -> int:
        """Address of new pinned host memory, which a GPU reads and writes over the bus."""
        return self._malloc("cudaMallocHost", nbytes)

    def free_host(self, pointer: int) -> None:
        self._call("cudaFreeHost", addressed(pointer))

    def prefetch(self, pointer: int, nbytes: int, location: int, stream: int = 0) -> None:
        """Have managed memory moved to `location`, in the order of `stream`; returns at once."""
        place = [self._place(location)] if self._by_number else [self._place(location), 0]  # 0: flags, none defined
        self._call("cudaMemPrefetchAsync", addressed(pointer), sized(nbytes), *place, stream, nbytes=nbytes)

    def advise(self, pointer: int, nbytes: int, advice: Advice, location: int) -> None:
        place = self._place(location)
        self._call("cudaMemAdvise", addressed(pointer), sized(nbytes), Advice(advice), place, nbytes=nbytes)

    def preferred_location(self, pointer: int, nbytes: int) -> int:
        """Where all of the range prefers to be: a device, `CPU`, or `NOWHERE` if none or not all alike."""
        return self._range_attribute(PREFERRED_LOCATION, pointer, nbytes)

    def last_prefetch_location(self, pointer: int, nbytes: int) -> int:
        """Where all of the range was last prefetched to: a device, `CPU`, or `NOWHERE` if none or not all alike."""
        return self._range_attribute(LAST_PREFETCH_LOCATION, pointer, nbytes)

    def pointer_kind(self, pointer: int) -> PointerAttributes:
        found = Attributes()
        self._call("cudaPointerGetAttributes", found, addressed(pointer))
        return PointerAttributes(KINDS[found.type], found.device)

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the current device."""
        free, total = N(), N()
        self._call("cudaMemGetInfo", free, total)
        return free.value, total.value

    def device_attribute(self, attribute: DeviceAttribute, device: int) -> int:
        value = I()
        self._call("cudaDeviceGetAttribute", value, DeviceAttribute(attribute), device)
        return value.value

    def synchronize(self) -> None:
        """Wait for everything on the current device."""
        self._call("cudaDeviceSynchronize")

    def synchronize_stream(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def _malloc(self, name: str, nbytes: int, *flags: int) -> int:
        pointer = P()
        self._call(name, pointer, sized(nbytes), *flags, nbytes=nbytes)
        assert pointer.value is not None, f"{name} succeeded without an address"
        return pointer.value

    def _range_attribute(self, attribute: int, pointer: int, nbytes: int) -> int:
        value = I()
        where = ctypes.addressof(value), ctypes.sizeof(value)
        self._call("cudaMemRangeGetAttribute", *where, attribute, addressed(pointer), sized(nbytes), nbytes=nbytes)
        return value.value

    def _place(self, location: int) -> int | Location:
        """A location as this version of the library takes it."""
        if location < CPU:
            raise ValueError(f"a location is a device's number or {CPU} for the CPU, not {location}")
        if self._by_number:
            return location
        return Location(LOCATED_ON_HOST, 0) if location == CPU else Location(LOCATED_ON_DEVICE, location)

    def _declare(self, signatures: dict[str, tuple[Any, ...]]) -> None:
        for name, (result, *arguments) in signatures.items():
            try:
                function = getattr(self._library, name)
            except AttributeError as error:
                raise RuntimeError(f"{self.path} is no CUDA runtime this project can use: it lacks {name}") from error
            function.restype, function.argtypes = result, arguments

    def _call(self, name: str, *arguments: Any, nbytes: int | None = None) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            self._library.cudaGetLastError()  # the error is told here; left there, torch would tell it again
            error, text = self._library.cudaGetErrorName(code), self._library.cudaGetErrorString(code)
            kind = CudaOutOfMemoryError if code == OUT_OF_MEMORY else CudaError
            raise kind(name, code, error.decode(), text.decode(), nbytes)


def sized(nbytes: int) -> int:
    if nbytes <= 0:
        raise ValueError(f"a size in bytes must be positive, not {nbytes}")
    return nbytes


def addressed(pointer: int) -> int:
    if pointer <= 0:
        raise ValueError(f"an address must be positive, not {pointer}")
    return pointer
