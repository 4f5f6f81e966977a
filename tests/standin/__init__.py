"""The stand-in CUDA runtime: `cudart.c` compiled, and a fresh copy of it for each test.

A copy has its own file name, so the loader gives it its own globals: nothing is left over from another test.
"""

import atexit
import ctypes
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from train.paged.cudart import Runtime

SOURCE = Path(__file__).parent / "cudart.c"
VERSIONS = (12080, 13000)  # one of each signature
ON_HOST, ON_DEVICE, EVICTED = 0, 1, 2
copies = itertools.count()


class Call(ctypes.Structure):
    """One call, as logged: `offset` into the allocation of that number, `detail` the advice, attribute or flags."""

    _fields_ = [
        ("raw_name", ctypes.c_char * 32),
        ("pointer", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("allocation", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("location", ctypes.c_int32),
        ("detail", ctypes.c_int32),
        ("code", ctypes.c_int32),
    ]

    @property
    def name(self) -> str:
        return self.raw_name.decode()

    def __repr__(self) -> str:
        where = f"allocation {self.allocation}+{self.offset}, {self.size} bytes"
        return f"{self.name}({where}, to {self.location}, on {self.stream}, {self.detail}) = {self.code}"


class Report(ctypes.Structure):
    """What is allocated, what went wrong, what moved."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("live", "live_bytes", "allocations"),
            *("freed_twice", "unknown_pointers", "damaged_guards", "written_after_free"),
            *("evictions", "lost_writes", "bytes_to_device", "bytes_to_host", "resident_bytes", "spike"),
        )
    ]

    @property
    def mistakes(self) -> dict[str, int]:
        """How often memory was misused; empty if never."""
        names = ("freed_twice", "unknown_pointers", "damaged_guards", "written_after_free", "lost_writes")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


class Standin:
    """A runtime, and the tests' handles on what is behind it."""

    def __init__(self, path: Path) -> None:
        self.runtime = Runtime(path)
        self.library = ctypes.CDLL(str(path))  # the same library: one path is loaded once
        self.library.standin_report.restype = Report
        self.library.standin_num_calls.restype = ctypes.c_int64

    def calls(self, *names: str) -> list[Call]:
        """The calls so far, in order; only those of these names, if any are given."""
        length = self.library.standin_num_calls()
        assert length <= 1 << 16, "the stand-in keeps 65,536 calls"
        found = (Call * length)()
        self.library.standin_calls(found, ctypes.c_int64(0), ctypes.c_int64(length))
        return [call for call in found if not names or call.name in names]

    def fail(self, name: str, nth: int = 1, code: int = 2) -> None:
        """Make the `nth` call from now of this function fail with `code`."""
        self.library.standin_fail(name.encode(), ctypes.c_int64(nth), code)

    def memory(self, capacity: int, page_size: int = 4096) -> None:
        """Size of the device, and of a page; before anything is allocated."""
        self.library.standin_memory(ctypes.c_int64(capacity), ctypes.c_int64(page_size))

    def attributes(self, *, managed: int = 1, concurrent: int = 1) -> None:
        self.library.standin_attributes(managed, concurrent)

    def misalign(self, nbytes: int) -> None:
        self.library.standin_misalign(ctypes.c_int64(nbytes))

    def spike(self, nbytes: int) -> None:
        """Take this much of the device, as activations do: managed pages are evicted to make room. 0 gives it back."""
        if self.library.standin_spike(ctypes.c_int64(nbytes)):
            raise MemoryError(f"a spike of {nbytes} bytes exceeds the device")

    def state(self, pointer: int) -> int:
        """Of the page at an address: `ON_HOST`, `ON_DEVICE` or `EVICTED`."""
        return self.library.standin_state(ctypes.c_void_p(pointer))

    def last_error(self) -> int:
        """The error that the runtime keeps for this thread and would tell to whoever asks next."""
        return self.library.standin_last_error()

    def report(self) -> Report:
        return self.library.standin_report()

    def forgive(self) -> None:
        """Forget the misuse so far, where a test meant it."""
        self.library.standin_forgive()

    def farewell(self, path: Path) -> None:
        """At the process's end, add a line to this file: allocations left, allocations made, wrong frees."""
        self.library.standin_farewell(os.fsencode(path))


@contextmanager
def fresh(version: int = VERSIONS[-1], *, capacity: int = 2**30, page_size: int = 4096) -> Iterator[Standin]:
    """A stand-in of its own. At the end nothing may be left allocated and no memory have been misused."""
    standin = Standin(copy(version))
    standin.memory(capacity, page_size)
    yield standin
    report = standin.report()
    assert not report.mistakes, report.mistakes
    assert report.live == 0, f"{report.live} allocations, {report.live_bytes} bytes, were not freed"


def copy(version: int) -> Path:
    """A library of a new name."""
    built = build(version)
    return Path(shutil.copy(built, built.with_name(f"standin-{version}-{os.getpid()}-{next(copies)}.so")))


@lru_cache
def build(version: int) -> Path:
    """The stand-in of one version of CUDA, compiled once a session."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    compiler = next(found for name in names if name and (found := shutil.which(name)))
    path = folder() / f"standin-{version}.so"
    flags = ["-O2", "-g", "-Wall", "-Werror", "-fPIC", "-shared", "-pthread", f"-DCUDART_VERSION={version}"]
    subprocess.run([compiler, *flags, "-o", str(path), str(SOURCE)], check=True, capture_output=True, text=True)
    return path


@lru_cache
def folder() -> Path:
    made = tempfile.mkdtemp(prefix="standin-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)
