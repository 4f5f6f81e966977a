"""The shim over the CUDA runtime: with both signatures over the stand-in, over the real libraries, by their headers."""

import ctypes.util
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.standin import VERSIONS, Standin, fresh
from train.paged import cudart
from train.paged.cudart import CPU, NOWHERE, Advice, CudaError, CudaOutOfMemoryError, DeviceAttribute, Runtime
from train.paged.libraries import WHEELS, in_site_packages

KiB = 2**10
MiB = 2**20
REAL = [major for major, (_, path) in WHEELS.items() if in_site_packages(path)]


@pytest.fixture
def pointer(cuda: Standin) -> Iterator[int]:
    made = cuda.runtime.malloc_managed(MiB)
    yield made
    cuda.runtime.free(made)


def real(major: str) -> Runtime:
    path = in_site_packages(WHEELS[major][1])
    assert path is not None
    return Runtime(path)


# What reaches CUDA


def test_managed_memory_is_allocated_for_all_streams_and_freed(cuda):
    pointer = cuda.runtime.malloc_managed(3 * KiB)
    assert cuda.report().live_bytes == 3 * KiB
    cuda.runtime.free(pointer)
    made, freed = cuda.calls("cudaMallocManaged", "cudaFree")
    assert (made.size, made.detail) == (3 * KiB, 1)  # cudaMemAttachGlobal
    assert made.pointer == freed.pointer == pointer


def test_pinned_memory_is_allocated_and_freed_by_its_own_calls(cuda):
    pointer = cuda.runtime.malloc_host(3 * KiB)
    assert cuda.runtime.pointer_kind(pointer).kind == "host"
    cuda.runtime.free_host(pointer)
    assert [call.name for call in cuda.calls() if "lloc" in call.name or "Free" in call.name] == [
        "cudaMallocHost",
        "cudaFreeHost",
    ]


@pytest.mark.parametrize("location", [0, CPU])
def test_a_prefetch_tells_range_place_and_stream(cuda, pointer, location):
    cuda.runtime.prefetch(pointer + 8 * KiB, 12 * KiB, location, stream=77)
    (call,) = cuda.calls("cudaMemPrefetchAsync")
    assert (call.offset, call.size, call.location, call.stream) == (8 * KiB, 12 * KiB, location, 77)
    assert cuda.runtime.last_prefetch_location(pointer + 8 * KiB, 12 * KiB) == location


def test_a_prefetch_is_on_the_default_stream_unless_told(cuda, pointer):
    cuda.runtime.prefetch(pointer, KiB, 0)
    assert cuda.calls("cudaMemPrefetchAsync")[0].stream == 0


@pytest.mark.parametrize("location", [0, CPU])
@pytest.mark.parametrize("advice", Advice)
def test_advice_tells_range_and_place(cuda, pointer, advice, location):
    cuda.runtime.advise(pointer + KiB, 2 * KiB, advice, location)
    (call,) = cuda.calls("cudaMemAdvise")
    assert (call.offset, call.size, call.detail, call.location) == (KiB, 2 * KiB, advice, location)


def test_locations_are_those_of_all_pages_or_none(cuda, pointer):
    runtime = cuda.runtime
    assert runtime.preferred_location(pointer, MiB) == runtime.last_prefetch_location(pointer, MiB) == NOWHERE
    runtime.prefetch(pointer, MiB, 0)
    runtime.advise(pointer, MiB, Advice.SET_PREFERRED_LOCATION, CPU)
    assert (runtime.last_prefetch_location(pointer, MiB), runtime.preferred_location(pointer, MiB)) == (0, CPU)
    runtime.prefetch(pointer, 4 * KiB, CPU)
    runtime.advise(pointer, 4 * KiB, Advice.UNSET_PREFERRED_LOCATION, CPU)
    assert runtime.last_prefetch_location(pointer, MiB) == runtime.preferred_location(pointer, MiB) == NOWHERE
    rest = pointer + 4 * KiB, MiB - 4 * KiB
    assert (runtime.last_prefetch_location(*rest), runtime.preferred_location(*rest)) == (0, CPU)


def test_an_address_is_known_by_its_kind(cuda, pointer):
    assert cuda.runtime.pointer_kind(pointer + 5) == ("managed", 0)
    assert cuda.runtime.pointer_kind(16) == ("unregistered", NOWHERE)


def test_memory_info_is_free_and_total(cuda, pointer):
    cuda.runtime.prefetch(pointer, MiB, 0)
    cuda.spike(3 * MiB)
    assert cuda.runtime.memory_info() == (2**30 - 4 * MiB, 2**30)
    cuda.spike(0)


def test_attributes_are_told_apart(cuda):
    cuda.attributes(managed=1, concurrent=0)
    assert cuda.runtime.device_attribute(DeviceAttribute.MANAGED_MEMORY, 0) == 1
    assert cuda.runtime.device_attribute(DeviceAttribute.CONCURRENT_MANAGED_ACCESS, 0) == 0


def test_waiting_is_for_the_device_or_for_a_stream(cuda):
    cuda.runtime.synchronize()
    cuda.runtime.synchronize_stream(77)
    one, other = cuda.calls("cudaDeviceSynchronize", "cudaStreamSynchronize")
    assert (one.name, other.name, other.stream) == ("cudaDeviceSynchronize", "cudaStreamSynchronize", 77)


def test_both_signatures_come_to_the_same():
    logs = []
    for version in VERSIONS:
        with fresh(version) as cuda:
            assert cuda.runtime.version == version
            pointer = cuda.runtime.malloc_managed(MiB)
            for location in (0, CPU):
                cuda.runtime.prefetch(pointer + 4 * KiB, 64 * KiB, location, stream=5)
                cuda.runtime.advise(pointer, 8 * KiB, Advice.SET_ACCESSED_BY, location)
            with pytest.raises(CudaError):
                cuda.runtime.prefetch(pointer, KiB, 7)
            cuda.runtime.free(pointer)
            logs.append(list(map(repr, cuda.calls())))
    assert logs[0] == logs[1]


# Errors

CALLS: dict[str, tuple[Callable[[Runtime, int], object], int | None]] = {
    "cudaMallocManaged": (lambda runtime, _: runtime.malloc_managed(5), 5),
    "cudaMallocHost": (lambda runtime, _: runtime.malloc_host(6), 6),
    "cudaFree": (lambda runtime, pointer: runtime.free(pointer), None),
    "cudaFreeHost": (lambda runtime, pointer: runtime.free_host(pointer), None),
    "cudaMemPrefetchAsync": (lambda runtime, pointer: runtime.prefetch(pointer, 7, 0), 7),
    "cudaMemAdvise": (lambda runtime, pointer: runtime.advise(pointer, 8, Advice.SET_READ_MOSTLY, 0), 8),
    "cudaMemRangeGetAttribute": (lambda runtime, pointer: runtime.preferred_location(pointer, 9), 9),
    "cudaPointerGetAttributes": (lambda runtime, pointer: runtime.pointer_kind(pointer), None),
    "cudaMemGetInfo": (lambda runtime, _: runtime.memory_info(), None),
    "cudaDeviceGetAttribute": (lambda runtime, _: runtime.device_attribute(DeviceAttribute.MANAGED_MEMORY, 0), None),
    "cudaStreamSynchronize": (lambda runtime, _: runtime.synchronize_stream(0), None),
    "cudaDeviceSynchronize": (lambda runtime, _: runtime.synchronize(), None),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fails_raises_what_cuda_says(cuda, pointer, name):
    call, nbytes = CALLS[name]
    cuda.fail(name, code=801)
    with pytest.raises(CudaError) as caught:
        call(cuda.runtime, pointer)
    error = caught.value
    assert (error.call, error.code, error.name, error.nbytes) == (name, 801, "cudaErrorNotSupported", nbytes)
    size = "" if nbytes is None else f"({nbytes} bytes)"
    assert str(error) == f"{name}{size} failed: operation not supported (cudaErrorNotSupported, 801)"
    assert cuda.last_error() == 0, "torch would report our error as its own"


def test_the_table_of_failing_calls_is_complete():
    helpers = {"cudaRuntimeGetVersion", "cudaGetLastError", "cudaGetErrorName", "cudaGetErrorString"}
    assert set(CALLS) == {*cudart.SIGNATURES, *cudart.PLACED_BY_NUMBER, *cudart.PLACED_BY_LOCATION} - helpers


def test_a_large_size_is_readable(cuda):
    cuda.fail("cudaMallocManaged")
    expected = r"^cudaMallocManaged\(1,048,576 bytes\) failed: out of memory \(cudaErrorMemoryAllocation, 2\)$"
    with pytest.raises(CudaError, match=expected):
        cuda.runtime.malloc_managed(MiB)


def test_memory_that_ran_out_is_torchs_error_too(cuda):
    """So that the command line ends as for any tensor that doesn't fit, with exit code 5."""
    cuda.fail("cudaMallocHost")
    with pytest.raises(torch.OutOfMemoryError, match="cudaMallocHost"):
        cuda.runtime.malloc_host(MiB)


@pytest.mark.parametrize("cls", [CudaError, CudaOutOfMemoryError])
def test_an_error_survives_pickling(cls):
    error = cls("cudaFree", 1, "cudaErrorInvalidValue", "invalid argument", 5)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (str(again), again.nbytes, again.code) == (str(error), 5, 1)


def test_freeing_twice_is_cudas_error_and_not_a_crash():
    with fresh() as cuda:
        pointer = cuda.runtime.malloc_managed(5)
        cuda.runtime.free(pointer)
        with pytest.raises(CudaError, match="cudaFree failed: invalid argument"):
            cuda.runtime.free(pointer)
        assert cuda.report().mistakes == {"freed_twice": 1}
        cuda.forgive()


@pytest.mark.parametrize("nbytes", [0, -1])
def test_sizes_are_positive(cuda, pointer, nbytes):
    runtime = cuda.runtime
    before = len(cuda.calls())
    for call in (
        lambda: runtime.malloc_managed(nbytes),
        lambda: runtime.malloc_host(nbytes),
        lambda: runtime.prefetch(pointer, nbytes, 0),
        lambda: runtime.advise(pointer, nbytes, Advice.SET_ACCESSED_BY, 0),
        lambda: runtime.preferred_location(pointer, nbytes),
        lambda: runtime.last_prefetch_location(pointer, nbytes),
    ):
        with pytest.raises(ValueError, match=f"a size in bytes must be positive, not {nbytes}"):
            call()
    assert len(cuda.calls()) == before


@pytest.mark.parametrize("pointer", [0, -4096])
def test_addresses_are_positive(cuda, pointer):
    runtime = cuda.runtime
    before = len(cuda.calls())
    for call in (
        lambda: runtime.free(pointer),
        lambda: runtime.free_host(pointer),
        lambda: runtime.prefetch(pointer, 5, 0),
        lambda: runtime.advise(pointer, 5, Advice.SET_ACCESSED_BY, 0),
        lambda: runtime.preferred_location(pointer, 5),
        lambda: runtime.pointer_kind(pointer),
    ):
        with pytest.raises(ValueError, match=f"an address must be positive, not {pointer}"):
            call()
    assert len(cuda.calls()) == before


def test_a_location_is_a_device_or_the_cpu(cuda, pointer):
    with pytest.raises(ValueError, match="a location is a device's number or -1 for the CPU, not -2"):
        cuda.runtime.prefetch(pointer, 5, NOWHERE)
    with pytest.raises(ValueError, match="not -3"):
        cuda.runtime.advise(pointer, 5, Advice.SET_ACCESSED_BY, -3)


# The libraries themselves


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=rf"the CUDA runtime library {tmp_path}/none.so cannot be loaded: .*No such"):
        Runtime(tmp_path / "none.so")


def test_a_file_that_is_no_library_is_named(tmp_path):
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(RuntimeError, match=r"text.so cannot be loaded: .*(invalid ELF|file too short)"):
        Runtime(tmp_path / "text.so")


@pytest.mark.skipif(sys.platform != "linux", reason="names a library of Linux")
def test_a_library_without_the_functions_is_named_with_the_first_it_lacks():
    path = ctypes.util.find_library("m")
    assert path is not None
    with pytest.raises(RuntimeError, match=rf"{path} is no CUDA runtime .*: it lacks cudaMallocManaged"):
        Runtime(path)


@pytest.mark.skipif(sys.platform != "linux", reason="the wheels are for Linux")
def test_both_wheels_are_there():
    assert set(REAL) == set(WHEELS), "pip install -e '.[dev]' brings nvidia-cuda-runtime and nvidia-cuda-runtime-cu12"


@pytest.mark.parametrize("major", REAL)
def test_a_real_library_loads_and_tells_its_version(major):
    runtime = real(major)
    assert runtime.version // 1000 == int(major)
    assert runtime.path.endswith(f"libcudart.so.{major}")


@pytest.mark.parametrize("major", REAL)
def test_a_real_library_answers_in_cudas_own_words(major):
    """Without a driver it says so; with one, it does not know device 9999."""
    runtime = real(major)
    with pytest.raises(CudaError) as caught:
        runtime.device_attribute(DeviceAttribute.MANAGED_MEMORY, 9999)
    known = {
        35: ("cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"),
        100: ("cudaErrorNoDevice", "no CUDA-capable device is detected"),
        101: ("cudaErrorInvalidDevice", "invalid device ordinal"),
    }
    assert (caught.value.name, caught.value.text) == known[caught.value.code]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a driver")
@pytest.mark.parametrize("major", REAL)
@pytest.mark.parametrize("name", CALLS)
def test_without_a_driver_every_call_raises_and_none_ends_the_process(major, name):
    call, nbytes = CALLS[name]
    with pytest.raises(CudaError) as caught:
        call(real(major), 4096)
    assert (caught.value.call, caught.value.nbytes) == (name, nbytes)
    assert caught.value.code in (35, 100)


ABI = """
#include <cuda_runtime_api.h>
#define SAME(ours, theirs) _Static_assert((ours) == (int)(theirs), #theirs)
%s
_Static_assert(sizeof(struct cudaPointerAttributes) <= %d, "room for cudaPointerAttributes");
_Static_assert(offsetof(struct cudaPointerAttributes, type) == 0, "type");
_Static_assert(offsetof(struct cudaPointerAttributes, device) == 4, "device");
_Static_assert(sizeof(struct cudaMemLocation) == %d, "cudaMemLocation");
_Static_assert(offsetof(struct cudaMemLocation, type) == 0 && offsetof(struct cudaMemLocation, id) == 4, "its fields");
cudaError_t (*malloc_managed)(void **, size_t, unsigned) = cudaMallocManaged;
cudaError_t (*release)(void *) = cudaFree;
cudaError_t (*malloc_host)(void **, size_t) = cudaMallocHost;
cudaError_t (*free_host)(void *) = cudaFreeHost;
cudaError_t (*range)(void *, size_t, enum cudaMemRangeAttribute, const void *, size_t) = cudaMemRangeGetAttribute;
cudaError_t (*attributes)(struct cudaPointerAttributes *, const void *) = cudaPointerGetAttributes;
cudaError_t (*info)(size_t *, size_t *) = cudaMemGetInfo;
cudaError_t (*attribute)(int *, enum cudaDeviceAttr, int) = cudaDeviceGetAttribute;
cudaError_t (*version)(int *) = cudaRuntimeGetVersion;
cudaError_t (*wait_stream)(cudaStream_t) = cudaStreamSynchronize;
cudaError_t (*wait)(void) = cudaDeviceSynchronize;
cudaError_t (*last)(void) = cudaGetLastError;
const char *(*name)(cudaError_t) = cudaGetErrorName;
const char *(*text)(cudaError_t) = cudaGetErrorString;
_Static_assert(sizeof(cudaError_t) == sizeof(int) && sizeof(enum cudaMemoryAdvise) == sizeof(int), "enums are ints");
#if CUDART_VERSION >= 13000
cudaError_t (*prefetch)(const void *, size_t, struct cudaMemLocation, unsigned, cudaStream_t) = cudaMemPrefetchAsync;
cudaError_t (*advise)(const void *, size_t, enum cudaMemoryAdvise, struct cudaMemLocation) = cudaMemAdvise;
#else
cudaError_t (*prefetch)(const void *, size_t, int, cudaStream_t) = cudaMemPrefetchAsync;
cudaError_t (*advise)(const void *, size_t, enum cudaMemoryAdvise, int) = cudaMemAdvise;
#endif
"""


def header_folders() -> list[Path]:
    """Headers of CUDA on this machine: Triton's, which are of CUDA 12, the two wheels', an installed toolkit's."""
    names = "triton/backends/nvidia/include", "nvidia/cuda_runtime/include", "nvidia/cu13/include"
    found = [*map(in_site_packages, names), "/usr/local/cuda/include"]
    return [folder for name in found if name and (folder := Path(name)).is_dir()]


@pytest.mark.parametrize("folder", header_folders(), ids=str)
def test_constants_structs_and_signatures_are_those_of_cudas_headers(folder, tmp_path):
    camel = {item: "".join(word.title() for word in item.name.split("_")) for item in (*Advice, *DeviceAttribute)}
    pairs = {f"cudaMemAdvise{camel[advice]}": advice.value for advice in Advice}
    pairs |= {f"cudaDevAttr{camel[attribute]}": attribute.value for attribute in DeviceAttribute}
    pairs |= {f"cudaMemoryType{kind.title()}": code for code, kind in enumerate(cudart.KINDS)}
    pairs |= {
        "cudaCpuDeviceId": CPU,
        "cudaInvalidDeviceId": NOWHERE,
        "cudaMemAttachGlobal": cudart.ATTACH_GLOBAL,
        "cudaErrorNotSupported": cudart.NOT_SUPPORTED,
        "cudaMemRangeAttributePreferredLocation": cudart.PREFERRED_LOCATION,
        "cudaMemRangeAttributeLastPrefetchLocation": cudart.LAST_PREFETCH_LOCATION,
        "cudaMemLocationTypeDevice": cudart.LOCATED_ON_DEVICE,
        "cudaMemLocationTypeHost": cudart.LOCATED_ON_HOST,
    }
    same = "\n".join(f"SAME({ours}, {theirs});" for theirs, ours in pairs.items())
    source = tmp_path / "abi.c"
    source.write_text(ABI % (same, ctypes.sizeof(cudart.Attributes), ctypes.sizeof(cudart.Location)))
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None
    includes = [f"-I{one}" for one in dict.fromkeys([folder, *header_folders()])]  # CUDA 13's wheel lacks crt/
    command = [compiler, "-std=c11", "-fsyntax-only", "-Werror", "-include", "stddef.h", *includes, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
