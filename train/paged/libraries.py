"""Where the CUDA runtime library is: torch's own copy first, then a wheel's, then the system's.

A process may hold several copies and they work on the same device and the same memory, but the one that torch has
loaded is sure to suit the driver. A torch built without CUDA has none; the wheels bring it in 1 MB, and then all of
this project but the GPU itself can be tested. The first place whose library loads is taken.
"""

import ctypes.util
import os
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from train.paged.cudart import Runtime

WHEELS = {  # by CUDA's major version: the wheel, and where it keeps the library
    "13": ("nvidia-cuda-runtime", "nvidia/cu13/lib/libcudart.so.13"),
    "12": ("nvidia-cuda-runtime-cu12", "nvidia/cuda_runtime/lib/libcudart.so.12"),
}
FILE_NAME = re.compile(r"libcudart(-[0-9a-f]+)?\.so(\.\d+)*")  # some wheels of torch put a hash into the name
MAPS = Path("/proc/self/maps")
TOOLKIT = Path("/usr/local/cuda/lib64/libcudart.so")


@dataclass(frozen=True)
class Candidate:
    """A place where the library may be, and what is there: a path, a name for the loader, or nothing."""

    source: str
    path: str | None


@dataclass(frozen=True)
class Attempt:
    """What became of a candidate: the runtime, or why there is none; neither where an earlier one was taken."""

    candidate: Candidate
    runtime: Runtime | None = None
    failure: str = ""


def find() -> Runtime:
    """The CUDA runtime of this process, loaded at the first call."""
    for attempt in search():
        if attempt.runtime is not None:
            return attempt.runtime
    looked = "; ".join(f"{attempt.candidate.source}: {attempt.failure}" for attempt in search())
    raise RuntimeError(f"no CUDA runtime library was found ({looked}); `pip install nvidia-cuda-runtime` brings one")


def search_order() -> list[str]:
    """A line for each place in the order in which they are tried: what is there, and which one is taken."""
    return [told(attempt) for attempt in search()]


@lru_cache
def search() -> tuple[Attempt, ...]:
    """Candidates are loaded until one works. Cached, since what it loads would be "loaded already" to the next."""
    attempts: list[Attempt] = []
    for candidate in candidates():
        if any(attempt.runtime for attempt in attempts):
            attempts.append(Attempt(candidate))
        elif candidate.path is None:
            attempts.append(Attempt(candidate, failure="none"))
        else:
            attempts.append(load(candidate, candidate.path))
    return tuple(attempts)


def load(candidate: Candidate, path: str) -> Attempt:
    try:
        return Attempt(candidate, Runtime(path))
    except RuntimeError as error:
        return Attempt(candidate, failure=str(error))


def told(attempt: Attempt) -> str:
    source, path = attempt.candidate.source, attempt.candidate.path
    if attempt.runtime is not None:
        return f"{source}: {path}, CUDA {version_text(attempt.runtime.version)}, taken"
    return f"{source}: {attempt.failure or path or 'none'}"


def version_text(version: int) -> str:
    """13050 is 13.5."""
    return f"{version // 1000}.{version % 1000 // 10}"


def candidates() -> list[Candidate]:
    """All places, in order."""
    majors = sorted(WHEELS, key=lambda major: (not (torch.version.cuda or "").startswith(major + "."), -int(major)))
    return [
        *places("loaded in this process", already_loaded()),
        *(Candidate(f"wheel {WHEELS[major][0]}", in_site_packages(WHEELS[major][1])) for major in majors),
        Candidate("the system's loader", ctypes.util.find_library("cudart")),
        Candidate(str(TOOLKIT.parent), str(TOOLKIT) if TOOLKIT.exists() else None),
        *places("LD_LIBRARY_PATH", on_library_path()),
    ]


def places(source: str, paths: list[str]) -> list[Candidate]:
    return [Candidate(source, path) for path in paths] or [Candidate(source, None)]


def already_loaded() -> list[str]:
    """Runtime libraries in this process's memory, which are torch's: by path, or without /proc by name."""
    if MAPS.exists():
        paths = [line.split(maxsplit=5)[5:] for line in MAPS.read_text().splitlines()]  # the path is the sixth column
        return list(dict.fromkeys(path for (path,) in filter(None, paths) if FILE_NAME.fullmatch(Path(path).name)))
    without_loading = getattr(os, "RTLD_NOLOAD", None)
    if without_loading is None:  # Windows
        return []
    return [name for major in WHEELS if is_loaded(name := f"libcudart.so.{major}", without_loading)]


def is_loaded(name: str, without_loading: int) -> bool:
    try:
        ctypes.CDLL(name, mode=without_loading)
    except OSError:
        return False
    return True


def in_site_packages(relative: str) -> str | None:
    paths = (Path(folder) / relative for folder in sys.path if folder)  # "" is the working directory: anyone's files
    return next((str(path) for path in paths if path.exists()), None)


def on_library_path() -> list[str]:
    folders = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    return [str(path) for folder in folders for path in sorted(folder.glob("libcudart.so*"))]
