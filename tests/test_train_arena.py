"""The arena: tensors over one allocation, and where its pages are."""

import contextlib
import copy
import ctypes
import gc
import pickle

import pytest
import torch

from tests.standin import ON_DEVICE, ON_HOST, Standin, fresh
from train.paged import arena as arena_module
from train.paged.allocation import View
from train.paged.arena import Arena, CudaArray, held
from train.paged.cudart import CPU, NOWHERE, Advice

KiB = 2**10
HOST = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64)


def made(cuda: Standin, nbytes: int = 64 * KiB, **options: bool) -> Arena:
    return Arena(nbytes, HOST, cuda.runtime, **options)


# Tensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_is_the_memory_at_its_offset(cuda, dtype):
    with made(cuda) as arena:
        whole = arena.tensor(0, (64 * KiB,), torch.uint8)
        part = arena.tensor(1024, (3, 5), dtype)
        assert (part.shape, part.dtype, part.device) == ((3, 5), dtype, HOST)
        assert part.is_contiguous()
        assert part.data_ptr() == whole.data_ptr() + 1024
        whole.zero_()
        part.copy_(torch.arange(15).view(3, 5))
        stop = 1024 + part.nbytes
        assert torch.equal(whole[1024:stop].view(dtype), torch.arange(15).to(dtype))
        assert not whole[:1024].any()
        assert not whole[stop:].any()


def test_fresh_memory_is_not_a_number():
    """So that a state which is never initialised shows in every test over the stand-in."""
    with fresh() as cuda, made(cuda) as arena:
        for dtype in DTYPES[:4]:
            assert arena.tensor(0, (100,), dtype).isnan().all()


@pytest.mark.parametrize("kind", ["managed", "pinned"])
def test_memory_begins_at_a_multiple_of_256(cuda, kind):
    cuda.attributes(concurrent=int(kind == "managed"))
    for nbytes in (1, 255, 4097):
        with made(cuda, nbytes) as arena:
            assert arena.kind == kind
            assert arena.tensor(0, (1,), torch.uint8).data_ptr() % 256 == 0


def test_memory_that_is_not_aligned_is_not_used_and_not_kept(cuda):
    cuda.misalign(128)
    with pytest.raises(AssertionError, match="not aligned to 256 bytes"):
        made(cuda)
    gc.collect()
    assert cuda.report().live == 0
    assert held(cuda.runtime, 0) == 0


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_a_tensor_of_nothing_has_its_shape_and_holds_no_memory(cuda, shape):
    arena = made(cuda)
    nothing = arena.tensor(64 * KiB, shape, torch.float32)
    assert (nothing.shape, nothing.dtype) == (shape, torch.float32)
    arena.close()
    assert cuda.report().live == 0


def test_a_tensor_of_no_dimensions_is_one_number(cuda):
    with made(cuda) as arena:
        step = arena.tensor(8, (), torch.int64)
        step.fill_(7)
        assert step.item() == arena.tensor(8, (1,), torch.int64).item() == 7


def test_a_tensor_reaches_the_last_byte_and_not_beyond(cuda):
    with made(cuda, 100) as arena:
        arena.tensor(96, (1,), torch.float32).zero_()
        with pytest.raises(ValueError, match=r"bytes of this arena are within 0..100, unlike 96..104"):
            arena.tensor(96, (2,), torch.float32)
        with pytest.raises(ValueError, match=r"unlike 101..101"):
            arena.tensor(101, (0,), torch.uint8)
        with pytest.raises(ValueError, match=r"unlike -4..0"):
            arena.tensor(-4, (1,), torch.float32)


def test_a_tensor_starts_where_its_type_can(cuda):
    with (
        made(cuda) as arena,
        pytest.raises(ValueError, match=r"torch.float32 starts at a multiple of 4 bytes, not at 6"),
    ):
        arena.tensor(6, (1,), torch.float32)


def test_a_shape_has_no_negative_sizes(cuda):
    with made(cuda) as arena, pytest.raises(ValueError, match=r"no negative sizes, unlike \(-2, -3\)"):
        arena.tensor(0, (-2, -3), torch.float32)


def test_a_closed_arena_refuses(cuda):
    arena = made(cuda)
    kept = arena.tensor(0, (5,), torch.float32)
    arena.close()
    for call in (
        lambda: arena.tensor(0, (5,), torch.float32),
        lambda: arena.tensor(0, (0,), torch.float32),
        lambda: arena.prefetch(0, 5, 0),
        lambda: arena.advise(0, 5, Advice.SET_ACCESSED_BY, 0),
        lambda: arena.location(0, 5),
    ):
        with pytest.raises(ValueError, match="this arena is closed; an open one is needed"):
            call()
    assert arena.closed
    del kept


def test_a_view_of_closed_memory_is_refused(cuda):
    """As when another thread closes the arena between the check and the tensor."""
    arena = made(cuda)
    arena.close()
    with pytest.raises(ValueError, match="closed to new tensors"):
        View(arena._memory)


def test_what_torch_is_given_on_a_gpu_describes_the_bytes(cuda):
    """The interface's version 3, as numba defines it: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""
    with made(cuda) as arena:
        array = CudaArray(4096, 100, View(arena._memory))
        assert array.__cuda_array_interface__ == {
            "version": 3,
            "data": (4096, False),
            "shape": (100,),
            "typestr": "|u1",
            "strides": None,
            "stream": None,
        }
        assert arena._memory.views == 1
        del array
        assert arena._memory.views == 0


def test_torch_holds_on_to_what_it_is_given_on_a_gpu(cuda, monkeypatch):
    """Without a GPU `as_tensor` is played by what torch does with one: look at the address, keep the object."""

    def as_tensor(array, device):
        address, _ = array.__cuda_array_interface__["data"]
        (nbytes,) = array.__cuda_array_interface__["shape"]
        over = (ctypes.c_uint8 * nbytes).from_address(address)
        over.kept = array
        return torch.frombuffer(over, dtype=torch.uint8)

    monkeypatch.setattr(arena_module.torch, "as_tensor", as_tensor)
    monkeypatch.setattr(arena_module, "current", lambda device: contextlib.nullcontext())
    arena = made(cuda)
    arena.device = torch.device("cuda", 0)
    tensor = arena.tensor(256, (2, 3), torch.float32)
    assert (tensor.shape, tensor.dtype) == ((2, 3), torch.float32)
    arena.close()
    assert cuda.report().live == 1
    del tensor
    assert cuda.report().live == 0


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"])
def test_an_arena_is_neither_pickled_nor_copied(cuda, how):
    with made(cuda) as arena, pytest.raises(TypeError, match="neither pickled nor copied: save the state_dict"):
        how(arena)


# Places


def test_ranges_are_prefetched_and_advised_where_they_are(cuda):
    with made(cuda) as arena:
        arena.prefetch(8 * KiB, 24 * KiB, 0, stream=5)
        arena.advise(4 * KiB, 6 * KiB, Advice.SET_PREFERRED_LOCATION, CPU)
        prefetch, advise = cuda.calls("cudaMemPrefetchAsync", "cudaMemAdvise")
        assert (prefetch.offset, prefetch.size, prefetch.location, prefetch.stream) == (8 * KiB, 16 * KiB, 0, 5)
        assert (advise.offset, advise.size, advise.location, advise.detail) == (4 * KiB, 2 * KiB, CPU, 3)
        assert arena.location(8 * KiB, 24 * KiB) == 0
        assert arena.location(0, 64 * KiB) == NOWHERE
        arena.prefetch(0, 64 * KiB, CPU)
        assert arena.location(0, 64 * KiB) == CPU


def test_an_empty_range_is_left_alone(cuda):
    with made(cuda) as arena:
        before = len(cuda.calls())
        arena.prefetch(8, 8, 0)
        arena.advise(64 * KiB, 64 * KiB, Advice.SET_ACCESSED_BY, 0)
        assert len(cuda.calls()) == before
        with pytest.raises(ValueError, match="at least one byte"):
            arena.location(8, 8)


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (6, 5), (0, 65537)])
def test_a_range_lies_within_the_arena(cuda, start, stop):
    with made(cuda) as arena:
        for call in (
            lambda: arena.prefetch(start, stop, 0),
            lambda: arena.advise(start, stop, Advice.SET_ACCESSED_BY, 0),
            lambda: arena.location(start, stop),
        ):
            with pytest.raises(ValueError, match=rf"within 0..65536, unlike {start}..{stop}"):
                call()


def test_evicted_states_come_back_with_a_prefetch_to_either_side():
    """What activations do to paged states, and what a forgotten prefetch looks like over the stand-in."""
    with fresh(capacity=128 * KiB) as cuda, made(cuda) as arena:
        state = arena.tensor(0, (16 * KiB,), torch.float32)
        state.copy_(torch.arange(16 * KiB))
        arena.prefetch(0, 64 * KiB, 0)
        assert cuda.report().resident_bytes == 64 * KiB
        cuda.spike(96 * KiB)
        assert cuda.report().resident_bytes == 32 * KiB
        assert state[: 8 * KiB].isnan().all()
        assert torch.equal(state[8 * KiB :], torch.arange(8 * KiB, 16 * KiB).float())
        cuda.spike(0)
        arena.prefetch(0, 16 * KiB, 0)
        arena.prefetch(16 * KiB, 32 * KiB, CPU)
        assert [cuda.state(state.data_ptr() + page) for page in (0, 16 * KiB, 32 * KiB)] == [
            ON_DEVICE,
            ON_HOST,
            ON_DEVICE,
        ]
        assert torch.equal(state, torch.arange(16 * KiB).float())
        assert cuda.report().evictions == 8
        del state
