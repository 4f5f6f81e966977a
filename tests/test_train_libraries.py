"""Where the CUDA runtime is looked for, which one is taken, and how the doctor tells it."""

import ctypes
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from tests.standin import Standin, copy, fresh
from train import doctor
from train.paged import libraries
from train.paged.libraries import Candidate, candidates, find, in_site_packages, search_order

ROOT = Path(__file__).parent.parent
NOT_TWO = [path for _, path in libraries.WHEELS.values() if in_site_packages(path) is None]
needs_wheels = pytest.mark.skipif(sys.platform != "linux" or bool(NOT_TWO), reason="the wheels are for Linux")


@pytest.fixture(autouse=True)
def _search_anew() -> Iterator[None]:
    libraries.search.cache_clear()
    yield
    libraries.search.cache_clear()


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with no runtime library in any place; the tests put some there, under this folder."""
    monkeypatch.setattr(libraries, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(libraries, "TOOLKIT", tmp_path / "cuda" / "lib64" / "libcudart.so")
    monkeypatch.setattr(libraries.ctypes.util, "find_library", lambda name: None)
    folders = ["", str(tmp_path / "site"), str(tmp_path / "more")]
    monkeypatch.setattr(libraries, "sys", SimpleNamespace(path=folders))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    (tmp_path / "maps").write_text("55d0-55d1 r--p 00000000 08:01 17 /usr/bin/python3.11\n")
    return tmp_path


def put(path: Path, version: int = 13000) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    copy(version).replace(path)
    return str(path)


def mapped(*paths: str) -> str:
    return "".join(f"7f00-7f01 r--p 00000000 08:01 17                 {path}\n" for path in paths)


# The order


def test_the_places_are_tried_from_torchs_own_to_the_systems(places):
    assert candidates() == [
        Candidate("loaded in this process", None),
        Candidate("wheel nvidia-cuda-runtime", None),
        Candidate("wheel nvidia-cuda-runtime-cu12", None),
        Candidate("the system's loader", None),
        Candidate(f"{places}/cuda/lib64", None),
        Candidate("LD_LIBRARY_PATH", None),
    ]


@pytest.mark.parametrize(
    ("cuda", "first"), [(None, "13"), ("13.0", "13"), ("12.8", "12"), ("14.1", "13"), ("11.8", "13")]
)
def test_the_wheel_of_torchs_cuda_comes_first(places, monkeypatch, cuda, first):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    wheels = [candidate.source for candidate in candidates() if candidate.source.startswith("wheel")]
    names = {"13": "wheel nvidia-cuda-runtime", "12": "wheel nvidia-cuda-runtime-cu12"}
    assert wheels == [names.pop(first), *names.values()]


def test_what_the_process_has_loaded_is_read_from_its_maps(places):
    found = ["/a/libcudart.so.13", "/b/libcudart-d0da41ae.so.11.0", "/c c/libcudart.so.12.4.127", "/d/libcudart.so"]
    others = ["/a/libcudartless.so", "/a/libcudart_static.a", "/a/xlibcudart.so", "/a/libcudart.so.13.txt", "[heap]"]
    (places / "maps").write_text(mapped(*found, *others, found[0]))
    assert [candidate.path for candidate in candidates() if candidate.source == "loaded in this process"] == found


def test_without_proc_the_loader_is_asked(places, monkeypatch):
    (places / "maps").unlink()
    asked = []

    def load(name, mode):
        asked.append((name, mode))
        if name != "libcudart.so.12":
            raise OSError(name)

    monkeypatch.setattr(libraries.ctypes, "CDLL", load)
    assert candidates()[0] == Candidate("loaded in this process", "libcudart.so.12")
    assert asked == [("libcudart.so.13", os.RTLD_NOLOAD), ("libcudart.so.12", os.RTLD_NOLOAD)]


def test_asking_the_loader_loads_nothing(places):
    (places / "maps").unlink()
    before = Path("/proc/self/maps").read_text().count("libcudart") if Path("/proc/self/maps").exists() else 0
    candidates()
    after = Path("/proc/self/maps").read_text().count("libcudart") if Path("/proc/self/maps").exists() else 0
    assert after == before


def test_where_the_loader_cannot_be_asked_nothing_is_loaded(places, monkeypatch):
    (places / "maps").unlink()
    monkeypatch.delattr(os, "RTLD_NOLOAD")
    assert candidates()[0] == Candidate("loaded in this process", None)


def test_each_place_is_looked_into(places, monkeypatch):
    wheel13 = put(places / "more" / "nvidia/cu13/lib/libcudart.so.13")
    wheel12 = put(places / "site" / "nvidia/cuda_runtime/lib/libcudart.so.12", 12080)
    toolkit = put(places / "cuda/lib64/libcudart.so")
    one, two = put(places / "x/libcudart.so.12.8"), put(places / "y/libcudart.so.13")
    monkeypatch.setenv("LD_LIBRARY_PATH", os.pathsep.join([f"{places}/x", "", f"{places}/none", f"{places}/y"]))
    monkeypatch.setattr(libraries.ctypes.util, "find_library", {"cudart": "libcudart.so.13"}.get)
    assert [candidate.path for candidate in candidates()] == [
        *(None, wheel13, wheel12, "libcudart.so.13"),
        *(toolkit, one, two),
    ]


def test_the_first_path_with_a_wheel_is_taken(places):
    first = put(places / "site" / "nvidia/cu13/lib/libcudart.so.13")
    put(places / "more" / "nvidia/cu13/lib/libcudart.so.13")
    assert candidates()[1].path == first


def test_no_library_is_taken_from_the_working_directory(places, monkeypatch):
    """Both paths name it by an empty entry; what lies there may be anyone's."""
    put(places / "nvidia/cu13/lib/libcudart.so.13")
    put(places / "libcudart.so.13")
    monkeypatch.setenv("LD_LIBRARY_PATH", os.pathsep)
    monkeypatch.chdir(places)
    assert {candidate.path for candidate in candidates()} == {None}


# The one that is taken


def test_the_first_that_loads_is_taken_and_kept(places):
    broken = places / "site" / "nvidia/cu13/lib/libcudart.so.13"
    broken.parent.mkdir(parents=True)
    broken.write_text("no library")
    wheel12 = put(places / "site" / "nvidia/cuda_runtime/lib/libcudart.so.12", 12080)
    toolkit = put(places / "cuda/lib64/libcudart.so")
    runtime = find()
    assert (runtime.path, runtime.version) == (wheel12, 12080)
    assert find() is runtime
    none, wheel13, taken, *rest = search_order()
    assert none == "loaded in this process: none"
    assert wheel13.startswith(f"wheel nvidia-cuda-runtime: the CUDA runtime library {broken} cannot be loaded: ")
    assert taken == f"wheel nvidia-cuda-runtime-cu12: {wheel12}, CUDA 12.8, taken"
    assert rest == ["the system's loader: none", f"{places}/cuda/lib64: {toolkit}", "LD_LIBRARY_PATH: none"]


def test_torchs_own_is_taken_before_all_others(places):
    put(places / "site" / "nvidia/cu13/lib/libcudart.so.13")
    own = put(places / "torch/libcudart.so.12", 12080)
    (places / "maps").write_text(mapped(own))
    assert find().path == own


def test_where_there_is_none_every_place_is_named(places):
    (places / "cuda/lib64").mkdir(parents=True)
    (places / "cuda/lib64/libcudart.so").write_text("no library")
    expected = (
        r"^no CUDA runtime library was found \(loaded in this process: none; wheel nvidia-cuda-runtime: none; "
        rf"wheel nvidia-cuda-runtime-cu12: none; the system's loader: none; {places}/cuda/lib64: the CUDA runtime "
        rf"library {places}/cuda/lib64/libcudart.so cannot be loaded: .*; LD_LIBRARY_PATH: none\); "
        "`pip install nvidia-cuda-runtime` brings one$"
    )
    with pytest.raises(RuntimeError, match=expected):
        find()


@pytest.mark.parametrize(("version", "text"), [(13050, "13.5"), (12080, "12.8"), (12090, "12.9"), (13000, "13.0")])
def test_a_version_is_readable(version, text):
    assert libraries.version_text(version) == text


@needs_wheels
def test_what_is_loaded_already_wins_in_a_real_process():
    """With CUDA 12's runtime in the process, as a torch of CUDA 12 has it, CUDA 13's wheel is not loaded beside it."""
    path = in_site_packages(libraries.WHEELS["12"][1])
    code = (
        "import ctypes, sys; ctypes.CDLL(sys.argv[1]); from train.paged.libraries import find; runtime = find();"
        "print(runtime.path, runtime.version // 1000, 'libcudart.so.13' in open('/proc/self/maps').read())"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [os.path.realpath(str(path)), "12", "False"]


@needs_wheels
def test_two_runtimes_in_one_process_do_not_disturb_each_other():
    from train.paged.cudart import Runtime

    both = [Runtime(str(in_site_packages(path))) for _, path in libraries.WHEELS.values()]
    assert [runtime.version // 1000 for runtime in both] == [13, 12]


def test_importing_the_paged_package_loads_no_library():
    code = (
        "import train.paged.arena, train.paged.libraries;"
        "print('libcudart' in open('/proc/self/maps').read() if __import__('torch').version.cuda is None else False)"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# The doctor


@pytest.fixture
def machine(places: Path) -> Iterator[Standin]:
    """A machine whose only runtime is a stand-in, in the toolkit's place."""
    with fresh(12080) as standin:
        (places / "cuda/lib64").mkdir(parents=True)
        (places / "cuda/lib64/libcudart.so").symlink_to(standin.runtime.path)
        yield standin


def test_the_doctor_tells_the_search_and_managed_memory(machine, places, monkeypatch):
    monkeypatch.setattr(doctor, "self_test", lambda device: "passed")
    console = Console(record=True, width=400, file=io.StringIO())
    report = doctor.command(doctor.DoctorOptions(), console)
    assert report["cuda runtime"] == search_order()
    assert report["cuda runtime"][4] == f"{places}/cuda/lib64: {places}/cuda/lib64/libcudart.so, CUDA 12.8, taken"
    assert report["managed memory"] == "CUDA 12.8: there, with concurrent access"
    shown = console.export_text()
    assert all(line in shown for line in search_order())
    assert "there, with concurrent access" in shown
    narrow = Console(record=True, width=40, file=io.StringIO())
    doctor.command(doctor.DoctorOptions(), narrow)
    assert "…" not in narrow.export_text(), "a path is to be read whole"


@pytest.mark.parametrize(
    ("managed", "concurrent", "told"),
    [
        (1, 0, "without concurrent access, so pinned host memory takes its place"),
        (0, 0, "not on this GPU, so pinned host memory takes its place"),
        (0, 1, "not on this GPU, so pinned host memory takes its place"),
    ],
)
def test_the_doctor_tells_what_is_missing(machine, managed, concurrent, told):
    machine.attributes(managed=managed, concurrent=concurrent)
    assert doctor.managed_memory() == f"CUDA 12.8: {told}"


def test_the_doctor_tells_cudas_own_error(machine):
    machine.fail("cudaDeviceGetAttribute", code=101)
    assert doctor.managed_memory() == (
        "CUDA 12.8: cudaDeviceGetAttribute failed: invalid device ordinal (cudaErrorInvalidDevice, 101)"
    )


def test_the_doctor_lives_without_a_library(places):
    assert doctor.managed_memory() == "no CUDA runtime library"


@needs_wheels
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a driver")
def test_without_a_driver_the_doctor_shows_what_cuda_says(places, monkeypatch):
    monkeypatch.setattr(libraries, "sys", sys)  # the real site-packages again
    told = doctor.managed_memory()
    assert told.startswith("CUDA 13.")
    assert "CUDA driver version is insufficient" in told or "no CUDA-capable device" in told


def test_the_runtime_is_callable_through_what_find_returns(machine):
    assert ctypes.CDLL(find().path).standin_last_error() == 0
    assert find().memory_info() == (2**30, 2**30)
