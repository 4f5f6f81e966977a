"""The stand-in runtime notices what it is there to notice: otherwise no test over it could fail."""

import ctypes
from collections.abc import Iterator

import pytest
import torch

from tests.standin import EVICTED, ON_DEVICE, ON_HOST, VERSIONS, Standin, fresh
from train.paged.cudart import CPU, CudaError

PAGE = 4096


@pytest.fixture(params=VERSIONS)
def cuda(request: pytest.FixtureRequest) -> Iterator[Standin]:
    with fresh(request.param, capacity=4 * PAGE) as standin:
        yield standin


def memory(pointer: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(pointer), dtype=torch.uint8)


def mistakes(cuda: Standin) -> dict[str, int]:
    """What was noticed, and forgotten with this."""
    found = cuda.report().mistakes
    cuda.forgive()
    return found


def test_what_is_not_freed_fails_the_test():
    with pytest.raises(AssertionError, match="1 allocations, 100 bytes, were not freed"), fresh() as cuda:
        cuda.runtime.malloc_managed(100)


def test_misuse_fails_the_test():
    with pytest.raises(AssertionError, match="unknown_pointers"), fresh() as cuda, pytest.raises(CudaError):
        cuda.runtime.free(4096)


def test_copies_know_nothing_of_one_another():
    with fresh() as one, fresh() as other:
        pointer = one.runtime.malloc_managed(5)
        assert (one.report().live, other.report().live) == (1, 0)
        assert other.runtime.pointer_kind(pointer).kind == "unregistered"
        one.runtime.free(pointer)


def test_wrong_frees_are_errors_and_counted(cuda):
    managed, pinned = cuda.runtime.malloc_managed(100), cuda.runtime.malloc_host(100)
    for free, pointer in (
        (cuda.runtime.free, 4096),
        (cuda.runtime.free, managed + 8),
        (cuda.runtime.free, pinned),
        (cuda.runtime.free_host, managed),
    ):
        with pytest.raises(CudaError, match="invalid argument"):
            free(pointer)
    assert mistakes(cuda) == {"unknown_pointers": 4}
    cuda.runtime.free(managed)
    cuda.runtime.free_host(pinned)
    with pytest.raises(CudaError, match="invalid argument"):
        cuda.runtime.free(managed)
    assert mistakes(cuda) == {"freed_twice": 1}


@pytest.mark.parametrize("offset", [-256, -1, 100, 100 + 255])
def test_a_write_beside_an_allocation_is_noticed(cuda, offset):
    pointer = cuda.runtime.malloc_managed(100)
    memory(pointer + offset, 1).fill_(1)
    assert cuda.report().mistakes == {"damaged_guards": 1}
    cuda.runtime.free(pointer)
    assert mistakes(cuda) == {"damaged_guards": 1}


@pytest.mark.parametrize("offset", [0, 99])
def test_a_write_within_an_allocation_is_fine(cuda, offset):
    pointer = cuda.runtime.malloc_managed(100)
    memory(pointer + offset, 1).fill_(1)
    cuda.runtime.free(pointer)
    assert cuda.report().mistakes == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_freed_memory_reads_as_not_a_number_and_a_write_to_it_is_noticed(cuda, dtype):
    pointer = cuda.runtime.malloc_managed(64)
    numbers = memory(pointer, 64).view(dtype).zero_()
    cuda.runtime.free(pointer)
    assert numbers.isnan().all()
    assert not cuda.report().mistakes
    numbers[-1] = 0
    assert mistakes(cuda) == {"written_after_free": 1}


def test_a_spike_evicts_what_was_prefetched_longest_ago(cuda):
    pointer = cuda.runtime.malloc_managed(4 * PAGE)
    for page in (2, 0, 3, 1):
        cuda.runtime.prefetch(pointer + page * PAGE, PAGE, 0)
    cuda.runtime.prefetch(pointer + 2 * PAGE, PAGE, 0)  # again: now the latest
    states = []
    for pages in range(5):
        cuda.spike(pages * PAGE)
        states.append([cuda.state(pointer + page * PAGE) for page in range(4)])
        assert cuda.runtime.memory_info()[0] == 0, "as much was evicted as was needed"
    in_order = [0, 3, 1, 2]
    for pages, state in enumerate(states):
        assert [state[page] for page in in_order] == [EVICTED] * pages + [ON_DEVICE] * (4 - pages)
    cuda.spike(0)
    assert cuda.runtime.memory_info() == (4 * PAGE, 4 * PAGE)
    report = cuda.report()
    assert (report.evictions, report.bytes_to_device, report.bytes_to_host) == (4, 4 * PAGE, 4 * PAGE)
    cuda.runtime.free(pointer)


def test_a_spike_beyond_the_device_is_out_of_memory(cuda):
    with pytest.raises(MemoryError):
        cuda.spike(4 * PAGE + 1)


@pytest.mark.parametrize("location", [0, CPU])
def test_an_evicted_page_is_not_a_number_until_it_is_prefetched(cuda, location):
    pointer = cuda.runtime.malloc_managed(PAGE + 100)
    numbers = memory(pointer, PAGE + 100).fill_(7)
    cuda.runtime.prefetch(pointer, PAGE + 100, 0)
    cuda.spike(4 * PAGE)
    assert numbers[: PAGE + 100 - 100 % 4].view(torch.float32).isnan().all()
    cuda.spike(0)
    assert (numbers != 7).all()
    cuda.runtime.prefetch(pointer + PAGE, 1, location)
    assert (numbers[PAGE:] == 7).all()
    assert (numbers[:PAGE] != 7).all()
    assert cuda.state(pointer + PAGE) == (ON_DEVICE if location == 0 else ON_HOST)
    cuda.runtime.free(pointer)


def test_a_write_to_an_evicted_page_is_noticed_as_lost(cuda):
    pointer = cuda.runtime.malloc_managed(PAGE)
    cuda.runtime.prefetch(pointer, PAGE, 0)
    cuda.spike(4 * PAGE)
    memory(pointer, PAGE)[5] = 1
    cuda.runtime.prefetch(pointer, PAGE, CPU)
    assert mistakes(cuda) == {"lost_writes": 1}
    cuda.spike(0)
    cuda.runtime.free(pointer)


def test_a_prefetch_makes_room_among_earlier_pages_and_without_room_stays_readable(cuda):
    one, other = cuda.runtime.malloc_managed(3 * PAGE), cuda.runtime.malloc_managed(3 * PAGE)
    memory(one, 3 * PAGE).fill_(1)
    memory(other, 3 * PAGE).fill_(2)
    cuda.runtime.prefetch(one, 3 * PAGE, 0)
    cuda.runtime.prefetch(other, 3 * PAGE, 0)
    assert [cuda.state(one + page * PAGE) for page in range(3)] == [EVICTED, EVICTED, ON_DEVICE]
    cuda.spike(4 * PAGE)
    cuda.runtime.prefetch(one, 3 * PAGE, 0)
    assert [cuda.state(one + page * PAGE) for page in range(3)] == [ON_HOST] * 3
    assert (memory(one, 3 * PAGE) == 1).all()
    cuda.spike(0)
    cuda.runtime.free(one)
    cuda.runtime.free(other)


def test_a_voluntary_move_to_the_host_loses_nothing(cuda):
    pointer = cuda.runtime.malloc_managed(2 * PAGE)
    memory(pointer, 2 * PAGE).fill_(3)
    cuda.runtime.prefetch(pointer, 2 * PAGE, 0)
    assert cuda.runtime.memory_info()[0] == 2 * PAGE
    cuda.runtime.prefetch(pointer, 2 * PAGE, CPU)
    assert cuda.runtime.memory_info()[0] == 4 * PAGE
    assert (memory(pointer, 2 * PAGE) == 3).all()
    assert cuda.report().evictions == 0
    cuda.runtime.free(pointer)


def test_memory_that_is_freed_makes_room(cuda):
    pointer = cuda.runtime.malloc_managed(4 * PAGE)
    cuda.runtime.prefetch(pointer, 4 * PAGE, 0)
    cuda.runtime.free(pointer)
    assert cuda.runtime.memory_info()[0] == 4 * PAGE


def test_the_nth_call_fails_and_the_others_do_not(cuda):
    cuda.fail("cudaMemGetInfo", nth=2, code=2)
    cuda.runtime.memory_info()
    cuda.runtime.synchronize()
    with pytest.raises(CudaError, match="out of memory"):
        cuda.runtime.memory_info()
    cuda.runtime.memory_info()
    assert [call.code for call in cuda.calls("cudaMemGetInfo")] == [0, 2, 0]


def test_an_error_is_kept_for_the_thread_until_it_is_asked_for(cuda):
    """As CUDA keeps it, and tells whoever asks next. The shim asks at once, so this calls around it."""
    cuda.fail("cudaDeviceSynchronize", code=801)
    assert cuda.library.cudaDeviceSynchronize() == 801
    assert cuda.last_error() == 801
    assert [cuda.library.cudaGetLastError(), cuda.last_error()] == [801, 0]


def test_ranges_outside_of_managed_memory_are_refused(cuda):
    managed, pinned = cuda.runtime.malloc_managed(100), cuda.runtime.malloc_host(100)
    for pointer, nbytes in ((managed, 101), (pinned, 5), (4096, 5)):
        with pytest.raises(CudaError, match="invalid argument"):
            cuda.runtime.prefetch(pointer, nbytes, 0)
    with pytest.raises(CudaError, match="invalid device ordinal"):
        cuda.runtime.prefetch(managed, 100, 1)
    cuda.attributes(concurrent=0)
    with pytest.raises(CudaError, match="invalid device ordinal"):
        cuda.runtime.prefetch(managed, 100, 0)
    cuda.runtime.free(managed)
    cuda.runtime.free_host(pinned)
