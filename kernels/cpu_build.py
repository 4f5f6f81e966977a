"""The C operators, built at first use with the compiler of this machine.

The sources in `kernels/c` take two seconds to compile, so no binary is shipped and the result fits this CPU. It
is kept in a cache folder under a name that tells the sources, the compiler and the CPU apart, and is moved there
whole, so that processes which build at the same time do not disturb one another. OpenMP comes from the runtime
that torch has loaded: two of them would fight over the cores. Without a compiler, or if the build fails, one
line in the log says so and everything runs in plain torch.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "c"
FLAGS = ("-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
ATTEMPTS = (("-march=native", "-fopenmp"), ("-march=native",), ())  # the last for compilers that know neither

log = logging.getLogger(__name__)


@lru_cache
def library() -> ctypes.CDLL | None:
    """The C operators, or None where they cannot be built. `QLORA_CPU=torch` does without them."""
    choice = os.environ.get("QLORA_CPU", "c")
    if choice not in ("c", "torch"):
        raise ValueError(f"QLORA_CPU says which operators run on a CPU and must be c or torch, not {choice!r}")
    if choice == "torch":
        return None
    try:
        return declared(ctypes.CDLL(str(build())))
    except (RuntimeError, OSError) as error:
        log.warning("no C operators on this CPU, plain torch instead: %s", error)
        return None


def build(options: tuple[tuple[str, ...], ...] = ATTEMPTS, cache: Path | None = None) -> Path:
    """Compile with the first of `options` that works, unless the cache has it; the shared object's path.

    A RuntimeError says what the compiler said.
    """
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("no C compiler (cc, gcc or clang) is on the path")
    folder = cache or cache_folder()
    said = ""
    for extra in options:
        path = folder / f"operators-{fingerprint(compiler, extra)}.so"
        if path.exists():
            return path
        said = compile_to(path, compiler, extra)
        if not said:
            return path
    raise RuntimeError(f"{compiler} failed: {' '.join(said.split())[:500]}")


def compile_to(path: Path, compiler: str, extra: tuple[str, ...]) -> str:
    """Compile, and move the result to `path`; what the compiler said if it failed, else nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, *extra, "-o", str(made), *map(str, sorted(SOURCES.glob("*.c"))), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return done.stderr or f"exit code {done.returncode}"
        made.replace(path)
    return ""


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qlora-from-scratch"


def fingerprint(compiler: str, extra: tuple[str, ...]) -> str:
    """A name for what determines the binary: sources, flags, compiler, and the CPU that "native" means."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256("\n".join([version, *FLAGS, *extra, cpu_name()]).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def capabilities() -> Mapping[str, Any]:
    """What torch knows of the CPU's instruction sets; nothing where it is too old to say."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def cpu_name() -> str:
    """The CPU with its instruction sets, as far as the system tells."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    keys = ("model name", "flags", "Features", "CPU part")
    found = {key: line for line in lines for key in keys if line.startswith(key)}
    return "\n".join([platform.machine(), platform.processor(), *found.values()])


class Scales(ctypes.Structure):
    """Stored scales as C sees them: `absmax`, or the five others."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("absmax", "codes", "nested", "map", "offset")),
        ("nested_block", ctypes.c_int64),
    ]


class View(ctypes.Structure):
    """A (B, H, T, C) tensor of bfloat16 whose channels are dense: its address, and three strides in elements."""

    _fields_ = [("data", ctypes.c_void_p), *((axis, ctypes.c_int64) for axis in "bht")]


class Codebook(ctypes.Structure):
    """Ascending levels, the midpoints between them, and the code of each level (null: its rank)."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("levels", "midpoints", "order")]


class DynamicMap(ctypes.Structure):
    """256 entries and the midpoints between them, and by the buckets of ratios how many midpoints lie below."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("entries", "midpoints", "below")),
        *((name, ctypes.c_int64) for name in ("lowest", "buckets")),
    ]


P, L, I, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float  # noqa: E741
S, B, V = ctypes.POINTER(Scales), ctypes.POINTER(Codebook), ctypes.POINTER(View)
M = ctypes.POINTER(DynamicMap)
SIGNATURES = {
    "dequantize": (None, P, S, P, P, L, L, I, I),
    "prefer_huge_pages": (None, P, L),
    "absmax": (None, P, P, L, L, I, I),
    "encode": (None, P, P, B, P, L, L, I, I, I),
    "encode_scales": (None, P, P, P, P, L, L, I),
    "squared_errors": (I, P, P, B, P, L, L, I, I),
    "search": (I, P, P, P, P, B, P, L, L, I, I, F, I, I),
    "multiply": (I, P, P, S, P, P, P, L, L, L, L, L, I, I),
    "multiplies_bf16": (I,),
    "multiply_panels": (I, P, L, P, S, P, P, P, L, L, L, L, L, I),
    "dropout_mask": (None, P, L, L, I, I),
    "thin": (None, P, P, L, L, I, F, I, I),
    "rms_norm": (None, P, P, P, P, L, L, F, I, I),
    "rms_norm_grad": (None, P, P, P, P, P, L, L, I, I),
    "rotate": (None, P, P, P, P, P, P, L, F, L, L, L, L, I, I),
    "swiglu": (None, P, P, P, L, I, I),
    "swiglu_grad": (None, P, P, P, P, P, L, I, I),
    "cross_entropy": (None, P, P, P, L, L, I, I, I),
    "attention": (I, V, V, V, V, P, L, L, L, L, L, F, I),
    "attention_grad": (I, V, V, V, V, P, V, V, V, V, L, L, L, L, L, F, I),
    "attends_in_bf16": (I,),
    "adamw": (None, P, L, I, I, I),
    "adamw_8bit": (None, P, L, I, I, M, I),
    "lion": (None, P, L, I, I, I),
}


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the C types of its functions."""
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded
