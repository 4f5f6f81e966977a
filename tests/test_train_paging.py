"""Paged states over the stand-in runtime: what moves when, a spike of activations, and memory that is never lost.

On the stand-in an evicted page holds poison until something prefetches it, so that whatever is read without a
prefetch shows as wrong numbers; each test ends with its leaks and misused memory counted.
"""

import gc
import pickle
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.optimizing import equal, give_gradients, parameters, states_equal, steps
from tests.standin import EVICTED, VERSIONS, Standin, copy, fresh
from train.paged import (
    AdamW,
    AdamW8bit,
    CudaError,
    Lion,
    OversubscriptionError,
    PagedAdamW,
    PagedAdamW8bit,
    Paging,
    fused,
)
from train.paged.cudart import CPU
from train.paged.pager import PAGE, in_pages

PAIRS = [(PagedAdamW, AdamW), (PagedAdamW8bit, AdamW8bit), (Lion, Lion)]
every_pair = pytest.mark.parametrize(("cls", "unpaged"), PAIRS)
FREED = b"\xfd\xff"  # what freed memory is filled with
WINDOW = 16384  # bytes: several windows for `SHAPES`, and parameters that lie in two


def paged(cls, cuda, params=None, window_bytes=WINDOW, **options):
    paging = Paging(runtime=cuda.runtime, window_bytes=window_bytes, **options)
    return cls(parameters() if params is None else params, lr=1e-2, paging=paging)


@every_pair
def test_results_do_not_depend_on_paging(cuda, cls, unpaged):
    ours, theirs = paged(cls, cuda), unpaged(parameters(), lr=1e-2)
    assert equal(steps(ours, 5), steps(theirs, 5))
    assert states_equal(ours, theirs)
    assert ours.memory_kind == "managed"
    assert len(ours.store.windows) > 1
    assert ours.managed_bytes == ours.state_bytes == cuda.report().live_bytes
    assert cuda.report().live == 1  # one arena, whatever the number of parameters
    ours.close()


@every_pair
def test_a_spike_of_activations_evicts_states_and_the_step_brings_them_back(cuda, cls, unpaged):
    """The point of paging: the device has room for the states or for the activations, and the run goes on."""
    cuda.memory(capacity=2**20)
    params = parameters([(64, 512), (300,), (100, 300)])
    ours, theirs = paged(cls, cuda, params), unpaged(parameters([(64, 512), (300,), (100, 300)]), lr=1e-2)
    for number in range(6):
        give_gradients(params, number)
        give_gradients(theirs.param_groups[0]["params"], number)
        resident = cuda.report().resident_bytes
        if number in (2, 3, 5):
            cuda.spike(2**20)  # forward and backward take all of the device
            assert cuda.report().resident_bytes == 0
            assert cuda.report().bytes_to_host >= resident > 0
            cuda.spike(0)
        ours.step()
        theirs.step()
        assert cuda.report().resident_bytes >= ours.state_bytes
    assert cuda.report().evictions >= 3 * ours.state_bytes // 4096
    assert equal(params, theirs.param_groups[0]["params"])
    assert states_equal(ours, theirs)
    ours.close()


def test_the_poison_of_evicted_states_would_show():
    """The test above can fail: a pager that fetches nothing computes on poison."""
    cuda = Standin(copy(VERSIONS[0]))
    ours, theirs = paged(PagedAdamW, cuda), AdamW(parameters(), lr=1e-2)
    steps(ours, 2)
    steps(theirs, 3)
    cuda.spike(2**30)
    state = ours.state[ours.param_groups[0]["params"][0]]["exp_avg"]
    assert cuda.state(state.data_ptr()) == EVICTED
    ours.store.pager = None
    assert not equal(steps(ours, 1, start=2), theirs.param_groups[0]["params"])


def test_states_move_a_window_ahead_of_the_update_and_each_byte_once(cuda, monkeypatch):
    optimizer = paged(PagedAdamW, cuda)
    steps(optimizer, 1)
    before, at_update = len(cuda.calls()), []

    def watched(operator, *arguments):
        at_update.append(len(cuda.calls("cudaMemPrefetchAsync")))
        return real(operator, *arguments)

    real = fused.form
    monkeypatch.setattr(fused, "form", watched)
    first = len(cuda.calls("cudaMemPrefetchAsync"))
    steps(optimizer, 1, start=1)
    calls = cuda.calls()[before:]
    windows, slots = len(optimizer.store.windows), len(optimizer.slots)
    assert [call.name for call in calls] == [
        "cudaMemAdvise",
        *["cudaMemPrefetchAsync"] * windows * slots,
        "cudaMemAdvise",
    ]
    assert [(c.offset, c.size, c.location) for c in (calls[0], calls[-1])] == [
        (0, optimizer.state_bytes, 0),
        (0, optimizer.state_bytes, CPU),
    ]
    prefetched = sorted((call.offset, call.offset + call.size) for call in calls[1:-1])
    assert all(call.location == 0 for call in calls[1:-1])
    assert prefetched[0][0] == 0
    assert all(end == start for (_, end), (start, _) in pairwise(prefetched))
    assert prefetched[-1][1] == optimizer.state_bytes
    # When window i is updated, window i + 1 has been asked for and window i + 2 has not.
    assert [count - first for count in at_update] == [min(i + 2, windows) * slots for i in range(windows)]
    optimizer.close()


def test_a_step_makes_as_many_calls_for_a_thousand_parameters_as_for_one(cuda):
    optimizer = paged(PagedAdamW, cuda, parameters([(16, 3)] * 1000), window_bytes=2**30)
    steps(optimizer, 1)
    before = len(cuda.calls())
    steps(optimizer, 1, start=1)
    assert [call.name for call in cuda.calls()[before:]] == [
        "cudaMemAdvise",
        *["cudaMemPrefetchAsync"] * 2,
        "cudaMemAdvise",
    ]  # and none that waits for the device
    optimizer.close()


def test_states_can_be_sent_to_the_cpu_and_brought_back(cuda):
    optimizer = paged(PagedAdamW, cuda)
    optimizer.evict()  # nothing yet, and nothing happens
    steps(optimizer, 1)
    arena = optimizer.store.memory
    for move, place in ((optimizer.evict, CPU), (optimizer.prefetch, 0), (optimizer.evict, CPU)):
        move()
        assert arena.location(0, arena.nbytes) == place
    steps(optimizer, 1, start=1)
    assert arena.location(0, arena.nbytes) == 0
    optimizer.close()


def test_a_state_dict_of_evicted_states_is_whole_and_outlives_the_memory(cuda):
    optimizer, other = paged(PagedAdamW8bit, cuda), AdamW8bit(parameters(), lr=1e-2)
    steps(optimizer, 3)
    steps(other, 3)
    cuda.spike(2**30)
    saved, expected = optimizer.state_dict(), other.state_dict()
    cuda.spike(0)
    optimizer.close()
    assert cuda.report().live == 0
    for key, state in expected["state"].items():
        assert all(torch.equal(saved["state"][key][name], state[name]) for name in state)


def test_a_resumed_run_is_still_paged(cuda):
    optimizer = paged(PagedAdamW, cuda)
    params = steps(optimizer, 2)
    saved = optimizer.state_dict()
    optimizer.close()
    resumed = paged(PagedAdamW, cuda, [torch.nn.Parameter(p.detach().clone()) for p in params])
    resumed.load_state_dict(saved)
    assert (resumed.memory_kind, cuda.report().live) == ("managed", 1)
    straight = AdamW(parameters(), lr=1e-2)
    assert equal(steps(resumed, 2, start=2), steps(straight, 4))
    resumed.load_state_dict(saved)  # into the memory that is there
    assert cuda.report().allocations == 2
    resumed.close()


def test_growing_takes_the_states_along_and_frees_the_old_memory(cuda):
    params, alone = parameters(), parameters()
    optimizer, reference = paged(PagedAdamW, cuda, params[:2]), AdamW(alone[:2], lr=1e-2)
    for either, all_of in ((optimizer, params), (reference, alone)):
        steps(either, 2)
        either.add_param_group({"params": all_of[2:]})
        steps(either, 2, start=2)
    assert equal(params, alone)
    assert (cuda.report().live, cuda.report().allocations) == (1, 2)
    optimizer.close()


def test_parameters_whose_gradients_come_late_find_room_in_the_memory_that_is_there(cuda):
    params = parameters()
    optimizer = paged(PagedAdamW, cuda, params)
    give_gradients(params[:1], 0)
    optimizer.step()
    steps(optimizer, 1, start=1)
    assert cuda.report().allocations == 1
    optimizer.close()


def test_old_memory_that_cannot_be_freed_is_told(cuda):
    params = parameters()
    optimizer = paged(PagedAdamW, cuda, params[:2])
    steps(optimizer, 1)
    optimizer.add_param_group({"params": params[2:]})
    cuda.fail("cudaFree")
    with pytest.raises(CudaError, match="cudaFree failed"):
        steps(optimizer, 1, start=1)
    steps(optimizer, 1, start=1)  # in the new memory, with the old states
    alone = parameters()
    other = AdamW(alone[:2], lr=1e-2)
    steps(other, 1)
    other.add_param_group({"params": alone[2:]})
    assert equal(steps(other, 1, start=1), params)
    optimizer.close()


@pytest.mark.parametrize("change", ["grow", "load", "reset"])
def test_evicted_states_are_read_and_replaced_like_others(cuda, change):
    params, alone = parameters(), parameters()
    optimizer, other = paged(PagedAdamW, cuda, params[:4]), AdamW(alone[:4], lr=1e-2)
    for either, all_of in ((optimizer, params), (other, alone)):
        steps(either, 1)
        saved = either.state_dict()
        steps(either, 1, start=1)
        cuda.spike(2**30)
        cuda.spike(0)
        if change == "grow":
            either.add_param_group({"params": all_of[4:]})
        elif change == "load":
            either.load_state_dict(saved)
        else:
            either.state.clear()
        steps(either, 2, start=2)
    assert cuda.report().evictions > 0
    assert equal(params, alone)
    optimizer.close()


def test_a_pickled_optimizer_holds_values_and_no_address(cuda):
    optimizer = paged(PagedAdamW, cuda)
    steps(optimizer, 2)
    twin = pickle.loads(pickle.dumps(optimizer))
    assert states_equal(optimizer, twin)
    with pytest.raises(TypeError, match="neither pickled nor copied"):
        pickle.dumps(optimizer.store.memory)
    optimizer.close()
    steps(twin, 1, start=2)


# How memory ends


def test_an_optimizer_that_is_forgotten_frees_its_memory(cuda):
    optimizer = paged(PagedAdamW, cuda)
    steps(optimizer, 1)
    assert cuda.report().live == 1
    del optimizer
    gc.collect()
    assert cuda.report().live == 0


def test_a_state_that_someone_holds_keeps_the_memory_until_it_goes(cuda):
    with paged(PagedAdamW, cuda) as optimizer:
        params = steps(optimizer, 1)
        state = optimizer.state[params[0]]["exp_avg"]
        value = state.clone()
    assert (optimizer.store, cuda.report().live) == (None, 1)
    assert torch.equal(state, value)
    del state
    assert cuda.report().live == 0


def test_an_error_in_the_middle_of_a_run_frees_the_memory(cuda):
    optimizer = paged(PagedAdamW, cuda)
    steps(optimizer, 1)
    with pytest.raises(KeyError), optimizer:
        raise KeyError("the run's own")
    assert cuda.report().live == 0


# What the runtime refuses


@pytest.mark.parametrize("call", ["cudaMallocManaged", "cudaMemGetInfo", "cudaDeviceGetAttribute"])
def test_a_failed_allocation_is_an_error_before_anything_moves(cuda, call):
    params, others = parameters(), parameters()
    optimizer = paged(PagedAdamW, cuda, params)
    cuda.fail(call)
    with pytest.raises(CudaError, match=f"{call}.* failed: out of memory"):
        steps(optimizer, 1)
    assert equal(params, parameters())
    assert (optimizer.state_bytes, cuda.report().live) == (0, 0)
    assert equal(steps(optimizer, 2), steps(AdamW(others, lr=1e-2), 2))  # and can be tried again
    optimizer.close()


def test_a_failed_allocation_on_growing_leaves_the_states_as_they_were(cuda):
    params = parameters()
    optimizer = paged(PagedAdamW, cuda, params[:2])
    steps(optimizer, 1)
    saved = optimizer.state_dict()
    optimizer.add_param_group({"params": params[2:]})
    cuda.fail("cudaMallocManaged")
    with pytest.raises(CudaError):
        steps(optimizer, 1, start=1)
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(now[k][name], saved["state"][k][name]) for k in saved["state"] for name in saved["state"][k])
    steps(optimizer, 1, start=1)
    optimizer.close()


def test_a_failed_allocation_on_loading_changes_nothing(cuda):
    source = AdamW(parameters(), lr=0.5)
    steps(source, 2)
    optimizer = paged(PagedAdamW, cuda)
    cuda.fail("cudaMallocManaged")
    with pytest.raises(CudaError):
        optimizer.load_state_dict(source.state_dict())
    assert (optimizer.state_dict()["state"], optimizer.param_groups[0]["lr"]) == ({}, 1e-2)


@pytest.mark.parametrize("call", ["cudaMemPrefetchAsync", "cudaMemAdvise"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_refused_hint_is_told_once_and_changes_no_result(cuda, caplog, call, nth):
    optimizer, other = paged(PagedAdamW, cuda), AdamW(parameters(), lr=1e-2)
    steps(optimizer, 1)
    steps(other, 1)
    cuda.fail(call, nth)
    cuda.fail(call, nth + 1)
    with caplog.at_level("WARNING"):
        assert equal(steps(optimizer, 3, start=1), steps(other, 3, start=1))
    (record,) = caplog.records
    assert "paged without hints" in record.message
    assert call in record.message
    optimizer.close()


def test_a_failed_free_is_told_and_can_be_tried_again(cuda):
    optimizer = paged(PagedAdamW, cuda)
    steps(optimizer, 1)
    arena = optimizer.store.memory
    cuda.fail("cudaFree")
    with pytest.raises(CudaError, match="cudaFree failed"):
        optimizer.close()
    assert cuda.report().live == 1
    arena.close()
    assert cuda.report().live == 0


def test_more_states_than_the_device_has_free_are_refused_before_anything_moves(cuda):
    cuda.memory(capacity=40960)
    params = parameters()
    optimizer = paged(PagedAdamW, cuda, params)
    with pytest.raises(OversubscriptionError, match=r"exceed the 0.0 MiB free.*allow_oversubscription"):
        steps(optimizer, 1)
    assert equal(params, parameters())
    assert cuda.report().allocations == 0


def test_oversubscription_that_is_allowed_says_what_it_means_and_computes_the_same(cuda, caplog):
    cuda.memory(capacity=16 * 4096)
    optimizer = paged(PagedAdamW, cuda, allow_oversubscription=True, window_bytes=8192)
    with caplog.at_level("WARNING"):
        assert equal(steps(optimizer, 4), steps(AdamW(parameters(), lr=1e-2), 4))
    assert [record.message for record in caplog.records if "moves over the bus at every step" in record.message]
    assert cuda.report().evictions > 0
    optimizer.close()


def test_states_go_to_pinned_memory_where_the_platform_has_no_managed(cuda, caplog):
    cuda.attributes(managed=0)
    optimizer = paged(PagedAdamW, cuda)
    with caplog.at_level("WARNING"):
        assert equal(steps(optimizer, 3), steps(AdamW(parameters(), lr=1e-2), 3))
    assert [record.message for record in caplog.records if "pinned host memory" in record.message]
    assert (optimizer.memory_kind, optimizer.managed_bytes) == ("pinned", 0)
    assert optimizer.state_bytes > 0
    optimizer.evict()
    optimizer.close()
    names = {call.name for call in cuda.calls()}
    assert {"cudaMallocHost", "cudaFreeHost"} <= names
    assert not names & {"cudaMallocManaged", "cudaMemPrefetchAsync", "cudaMemAdvise"}


OPERATIONS = (
    "step",
    "save",
    "load",
    "spike",
    "evict",
    "prefetch",
    "grow",
    "hold",
    "drop",
    "close",
    "new",
    "forget",
    "reset",
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(operations=st.lists(st.sampled_from(OPERATIONS), max_size=25), cls=st.sampled_from([c for c, _ in PAIRS]))
def test_whatever_is_done_nothing_leaks_is_freed_twice_or_read_when_freed(operations, cls):
    """An unpaged optimizer goes the same way, and both stay equal."""
    unpaged = dict(PAIRS)[cls]
    with fresh() as cuda:
        cuda.memory(capacity=2**18)

        def new() -> Any:
            shapes = [(33, 70), (5,)]
            return paged(cls, cuda, parameters(shapes)), unpaged(parameters(shapes), lr=1e-2)

        optimizer, other = new()
        saved: Any = None
        held: list[torch.Tensor] = []
        number = 0
        for operation in operations:
            if operation == "new" and optimizer is None:
                optimizer, other = new()
            if optimizer is None:
                continue
            if operation == "step":
                assert equal(steps(optimizer, 1, number), steps(other, 1, number))
                number += 1
            elif operation == "save":
                saved = optimizer.state_dict()
                assert states_equal(optimizer, other)
            elif operation == "load" and saved and len(saved["param_groups"]) == len(optimizer.param_groups):
                optimizer.load_state_dict(saved)
                other.load_state_dict(saved)
            elif operation == "spike":
                cuda.spike(2**18)
                cuda.spike(0)
            elif operation in ("evict", "prefetch"):
                getattr(optimizer, operation)()
            elif operation == "grow" and len(optimizer.param_groups) == 1:
                optimizer.add_param_group({"params": parameters([(40, 60)], seed=1)})
                other.add_param_group({"params": parameters([(40, 60)], seed=1)})
            elif operation == "reset":
                optimizer.state.clear()
                other.state.clear()
            elif operation == "hold":
                held += [state["exp_avg"] for state in optimizer.state.values()]
            elif operation == "drop":
                held.clear()
            elif operation in ("close", "forget"):
                if operation == "close":
                    optimizer.close()
                optimizer = other = None
            assert not cuda.report().mistakes
        for content in [bytes(state.view(-1).view(torch.uint8).tolist()) for state in held]:
            assert content != (FREED * len(content))[: len(content)]  # still there
        if optimizer is not None:
            optimizer.close()
        held.clear()
        optimizer = other = None
        gc.collect()


@given(
    slots=st.lists(st.integers(1, 3 * PAGE), min_size=1, max_size=5),
    windows=st.integers(1, 6),
    data=st.data(),
)
def test_windows_share_no_page_and_leave_none_out(slots, windows, data):
    offsets = [0, *accumulate(slots)]
    cuts = [sorted(data.draw(st.lists(st.integers(0, n), min_size=windows - 1, max_size=windows - 1))) for n in slots]
    edges = [
        [offset, *(offset + cut for cut in own), offset + n]
        for offset, own, n in zip(offsets, cuts, slots, strict=False)
    ]
    ranges = [[(own[w], own[w + 1]) for own in edges] for w in range(windows)]
    moved = in_pages(ranges, offsets[-1])
    pages = [page for window in moved for start, stop in window for page in range(start // PAGE, -(-stop // PAGE))]
    assert sorted(pages) == list(range(-(-offsets[-1] // PAGE)))
    come: set[int] = set()
    for window, there in zip(ranges, moved, strict=True):
        come |= {page for start, stop in there for page in range(start // PAGE, -(-stop // PAGE))}
        assert come >= {at // PAGE for start, stop in window if start < stop for at in (start, stop - 1)}
