"""Memory from its allocation to its end: what is refused, what happens when a call fails, who frees it and when."""

import contextlib
import gc
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.standin import VERSIONS, Standin, fresh
from train.paged import allocation
from train.paged.allocation import View
from train.paged.arena import Arena, held
from train.paged.cudart import CPU, Advice, CudaError

ROOT = Path(__file__).parent.parent
KiB, MiB = 2**10, 2**20
HOST = torch.device("cpu")


def made(cuda: Standin, nbytes: int = 64 * KiB, **options: bool) -> Arena:
    return Arena(nbytes, HOST, cuda.runtime, **options)


# The end


def test_memory_is_freed_when_the_arena_closes(cuda):
    arena = made(cuda)
    arena.tensor(0, (5,), torch.float32).zero_()
    assert not arena.closed
    arena.close()
    assert arena.closed
    assert cuda.report().live == held(cuda.runtime, 0) == 0
    arena.close()
    assert len(cuda.calls("cudaFree")) == 1


def test_memory_is_freed_after_what_the_device_still_does(cuda):
    made(cuda).close()
    assert [call.name for call in cuda.calls()][-2:] == ["cudaDeviceSynchronize", "cudaFree"]


def test_memory_outlives_the_arena_for_as_long_as_a_tensor_looks_into_it(cuda):
    with made(cuda) as arena:
        tensor = arena.tensor(0, (4, 4), torch.float32).fill_(3)
        column, array = tensor[:, 1], tensor.numpy()
    assert (arena.closed, cuda.report().live, held(cuda.runtime, 0)) == (True, 1, 64 * KiB)
    del tensor, arena
    assert torch.equal(column, torch.full((4,), 3.0))
    del column
    assert array.sum() == 48
    assert cuda.report().live == 1
    del array
    assert cuda.report().live == held(cuda.runtime, 0) == 0


def test_parameters_and_gradients_keep_memory_too(cuda):
    with made(cuda) as arena:
        weight = torch.nn.Parameter(arena.tensor(0, (4,), torch.float32).fill_(2))
    (weight**2).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((4,), 4.0))
    del weight
    assert cuda.report().live == 0


def test_an_arena_that_is_dropped_frees(cuda):
    arena = made(cuda)
    tensor = arena.tensor(0, (4,), torch.float32).fill_(2)
    del arena
    gc.collect()
    assert tensor.sum() == 8
    assert cuda.report().live == 1
    del tensor
    assert cuda.report().live == held(cuda.runtime, 0) == 0


def test_an_arena_in_a_cycle_is_freed_by_the_collector(cuda):
    gc.disable()
    try:
        holder: list[object] = [made(cuda)]
        holder.append(holder)
        del holder
        assert cuda.report().live == 1
        gc.collect()
        assert cuda.report().live == 0
    finally:
        gc.enable()


def test_an_error_inside_with_closes_too(cuda):
    with pytest.raises(KeyError), made(cuda):
        raise KeyError
    assert cuda.report().live == 0


@pytest.mark.parametrize("name", ["cudaFree", "cudaDeviceSynchronize"])
def test_close_raises_what_freeing_raises_and_can_be_tried_again(cuda, name):
    arena = made(cuda)
    cuda.fail(name, code=1)
    with pytest.raises(CudaError, match=f"{name} failed"):
        arena.close()
    assert arena.closed
    assert held(cuda.runtime, 0) == 64 * KiB
    arena.close()
    assert cuda.report().live == held(cuda.runtime, 0) == 0


def test_an_arena_whose_close_failed_is_freed_when_it_is_dropped(cuda):
    arena = made(cuda)
    cuda.fail("cudaFree", code=1)
    with pytest.raises(CudaError):
        arena.close()
    del arena
    assert cuda.report().live == 0


def test_an_error_in_a_finalizer_is_logged(cuda, caplog):
    arena = made(cuda)
    cuda.fail("cudaFree", code=1)
    cuda.fail("cudaDeviceSynchronize", nth=2, code=1)
    memory = arena._memory
    del arena
    assert "managed memory of 65536 bytes could not be freed: cudaFree failed" in caplog.text
    caplog.clear()
    tensor_less = View.__new__(View)  # a view whose end is the last
    memory.closed, memory.views, tensor_less.allocation = True, 1, memory
    del tensor_less
    assert "could not be freed: cudaDeviceSynchronize failed" in caplog.text
    memory.close()


def test_the_last_tensor_logs_an_error_of_freeing(cuda, caplog):
    arena = made(cuda)
    tensor = arena.tensor(0, (4,), torch.float32)
    arena.close()
    cuda.fail("cudaFree", code=1)
    del tensor
    assert "could not be freed: cudaFree failed" in caplog.text
    arena.close()
    assert cuda.report().live == 0


def test_an_error_of_torch_in_a_finalizer_is_logged_too(cuda, caplog, monkeypatch):
    """As when an earlier kernel has broken the device, and torch is the one to say so."""

    def broken(device: torch.device) -> contextlib.AbstractContextManager[None]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    arena = made(cuda)
    memory = arena._memory
    with monkeypatch.context() as patch:
        patch.setattr(allocation, "current", broken)
        del arena
    assert "could not be freed: CUDA error: an illegal memory access" in caplog.text
    memory.close()


PROGRAM = """
import gc, os, signal, sys, threading
from pathlib import Path
import torch
from tests.standin import VERSIONS, Standin, copy
from train.paged import allocation
from train.paged.arena import Arena, held
cuda = Standin(copy(VERSIONS[-1]))
gc.freeze()  # what was imported is not looked through again at each end
for number, ending in enumerate(sys.argv[1:]):
    child = os.fork()
    if not child:
        cuda.farewell(Path(f"{number}.left"))
        os.dup2(os.open(f"{number}.stderr", os.O_CREAT | os.O_WRONLY), 2)
        break
    os.waitpid(child, 0)
else:
    sys.exit()
arena = Arena(65536, torch.device("cpu"), cuda.runtime)
tensor = arena.tensor(0, (4,), torch.float32)
exec(ending)
"""


FREEING = (
    "del tensor",
    "arena.close(); del tensor",
    "del tensor; torch.kept = arena",  # in a module that goes after most others
    "del tensor; arena.itself = arena; del arena",
    "del tensor; sys.exit(3)",
    "del tensor; threading.Thread(target=lambda: arena.tensor(0, (4,), torch.float32).sum()).start()",
)
KEEPING = ("", "arena.close()", "torch.kept = tensor; del arena")
FORKING = """
assert held(cuda.runtime, 0) == 65536
child = os.fork()
if not child:
    cuda.farewell(Path("child"))
    assert held(cuda.runtime, 0) == 0
    arena.close()
    del tensor
    arena.close()
    del arena
    gc.collect()
    assert not cuda.calls("cudaFree", "cudaDeviceSynchronize"), cuda.calls()
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
tensor.fill_(2)
assert tensor.sum() == 8
assert held(cuda.runtime, 0) == 65536
del tensor
"""
FORKING_WHILE_LOCKED = """
del tensor
taken, done = threading.Event(), threading.Event()
def hold():
    with allocation._lock:
        taken.set()
        done.wait()
thread = threading.Thread(target=hold)
thread.start()
taken.wait()
child = os.fork()
if not child:
    signal.alarm(60)  # ends it if it hangs
    held(cuda.runtime, 0)
    os._exit(0)
done.set()
thread.join()
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """What is left by processes that make an arena and a tensor and end in each of these ways, and their stderr.

    Left are "a b c": a allocations of b, after c wrong frees. "child" is what the child of FORKING leaves. All are
    forks of one process that has imported torch, which takes longest.
    """
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    folder = tmp_path_factory.mktemp("ended")
    endings = (*FREEING, *KEEPING, FORKING, FORKING_WHILE_LOCKED)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", PROGRAM, *endings], cwd=folder, env=env, check=True, timeout=240)
    found = {ending: (folder / f"{n}.left", folder / f"{n}.stderr") for n, ending in enumerate(endings)}
    told = {ending: (left.read_text(), stderr.read_text()) for ending, (left, stderr) in found.items()}
    return {**told, "child": ((folder / "child").read_text(), "")}


@pytest.mark.parametrize("ending", FREEING)
def test_the_end_of_the_process_frees_what_nobody_looks_into(ended, ending):
    assert ended[ending] == ("0 1 0\n", "")


@pytest.mark.parametrize("ending", KEEPING)
def test_the_end_of_the_process_takes_no_memory_from_a_tensor(ended, ending):
    """A thread or another handler may still read it. The memory goes with the process."""
    assert ended[ending] == ("1 1 0\n", "")


def test_a_forked_child_frees_nothing(ended):
    assert ended[FORKING] == ("0 1 0\n", "")
    assert ended["child"] == ("1 1 0\n", "")


def test_a_child_forked_while_another_thread_counts_does_not_hang(ended):
    assert ended[FORKING_WHILE_LOCKED] == ("0 1 0\n", "")


def test_threads_that_drop_their_tensors_together_free_once(cuda):
    for _ in range(20):
        arena = made(cuda)
        tensors = [[arena.tensor(0, (4,), torch.float32) for _ in range(20)] for _ in range(4)]
        start = threading.Barrier(5)

        def drop(own: list[torch.Tensor], start: threading.Barrier = start) -> None:
            start.wait()
            while own:
                own.pop()

        threads = [threading.Thread(target=drop, args=(own,)) for own in tensors]
        for thread in threads:
            thread.start()
        start.wait()
        arena.close()
        for thread in threads:
            thread.join()
        assert arena._memory.views == 0
    report = cuda.report()
    assert (report.live, report.allocations, report.freed_twice) == (0, 20, 0)
    assert held(cuda.runtime, 0) == 0


# Choosing and refusing


@pytest.mark.parametrize(("managed", "concurrent"), [(0, 0), (1, 0), (0, 1)])
def test_a_device_that_cannot_page_gets_pinned_memory(cuda, managed, concurrent, caplog):
    cuda.attributes(managed=managed, concurrent=concurrent)
    with made(cuda) as arena, made(cuda) as other:
        assert arena.kind == other.kind == "pinned"
        arena.tensor(0, (4,), torch.float32).fill_(2)
        arena.prefetch(0, 64 * KiB, 0)
        arena.advise(0, 64 * KiB, Advice.SET_PREFERRED_LOCATION, CPU)
        assert arena.location(0, 64 * KiB) == CPU
        assert held(cuda.runtime, 0) == 0
    names = {call.name for call in cuda.calls()}
    assert {"cudaMallocHost", "cudaFreeHost"} <= names
    assert not names & {"cudaMallocManaged", "cudaFree", "cudaMemPrefetchAsync", "cudaMemAdvise"}
    assert caplog.text.count("pinned host memory instead of managed memory for device 0: it cannot move") == 1


def test_managed_memory_that_is_not_supported_is_pinned_instead(cuda, caplog):
    cuda.fail("cudaMallocManaged", code=801)
    with made(cuda) as arena:
        assert arena.kind == "pinned"
        assert held(cuda.runtime, 0) == 0
    assert (
        "instead of managed memory for device 0: cudaMallocManaged(65,536 bytes) failed: operation not" in caplog.text
    )


def test_pinned_memory_needs_no_room_on_the_device(caplog):
    with fresh(capacity=16 * KiB) as cuda:
        cuda.attributes(concurrent=0)
        made(cuda).close()


def test_more_than_the_device_has_free_is_refused_in_figures():
    with fresh(capacity=8 * MiB) as cuda:
        cuda.spike(2 * MiB)
        with made(cuda, 4 * MiB) as first:
            assert held(cuda.runtime, 0) == 4 * MiB
            expected = (
                r"3.0 MiB of managed memory, with 4.0 MiB held already, exceed the 6.0 MiB free on device 0: .*"
                "allow_oversubscription=True"
            )
            with pytest.raises(RuntimeError, match=expected):
                made(cuda, 3 * MiB)
            assert held(cuda.runtime, 0) == 4 * MiB
            assert len(cuda.calls("cudaMallocManaged")) == 1
            first.close()
            made(cuda, 3 * MiB).close()
        cuda.spike(0)


def test_exactly_what_is_free_is_given():
    with fresh(capacity=8 * MiB) as cuda:
        made(cuda, 8 * MiB).close()
        with pytest.raises(RuntimeError, match="exceed"):
            made(cuda, 8 * MiB + 1)


def test_oversubscription_is_allowed_on_request_and_logged_once_an_arena(caplog):
    with fresh(capacity=MiB) as cuda:
        with made(cuda, 3 * MiB, allow_oversubscription=True), made(cuda, MiB, allow_oversubscription=True):
            assert held(cuda.runtime, 0) == 4 * MiB
        records = [record for record in caplog.records if "moves over the bus at every step" in record.message]
        assert [record.levelno for record in records] == [logging.WARNING] * 2
        assert "3.0 MiB of managed memory, with 0.0 MiB held already, exceed the 1.0 MiB free" in records[0].message


def test_what_fits_is_not_logged(cuda, caplog):
    made(cuda, allow_oversubscription=True).close()
    assert not caplog.records


def test_devices_and_runtimes_are_counted_apart(cuda):
    with fresh() as other, made(cuda):
        assert held(other.runtime, 0) == held(cuda.runtime, 1) == 0


def test_refusals_of_an_arena_say_the_rule(cuda):
    with pytest.raises(ValueError, match="an arena's size in bytes must be positive, not 0"):
        made(cuda, 0)
    with pytest.raises(ValueError, match=r"an arena is for a cuda device, .* not for meta"):
        Arena(5, torch.device("meta"), cuda.runtime)
    assert not cuda.calls("cudaMallocManaged")


STEPS = (
    "cudaDeviceGetAttribute",
    "cudaMemGetInfo",
    "cudaMallocManaged",
    "cudaMemAdvise",
    "cudaMemPrefetchAsync",
    "cudaMemRangeGetAttribute",
    "cudaDeviceSynchronize",
    "cudaFree",
)


@pytest.mark.parametrize("name", STEPS)
def test_whichever_call_fails_nothing_is_lost(cuda, name):
    def use() -> None:
        with made(cuda) as arena:
            state = arena.tensor(0, (16,), torch.float32).fill_(2)
            arena.advise(0, 64 * KiB, Advice.SET_PREFERRED_LOCATION, CPU)
            arena.prefetch(0, 64 * KiB, 0)
            arena.location(0, 64 * KiB)
            assert state.sum() == 32
            del state  # with it alive, freeing would not be the end of `with`

    use()
    assert {call.name for call in cuda.calls()} == {*STEPS, "cudaRuntimeGetVersion"}
    nth = 2 if name == "cudaDeviceGetAttribute" else 1
    for failing in range(1, nth + 1):
        cuda.fail(name, nth=failing)
        with pytest.raises(CudaError, match=rf"^{name}\b") as caught:
            use()
        caught.value.__traceback__ = None  # it holds the arena
        del caught
        gc.collect()
        assert cuda.report().live == held(cuda.runtime, 0) == 0
        assert cuda.last_error() == 0
    use()


def test_pinned_memory_that_cannot_be_had_leaves_nothing(cuda):
    cuda.attributes(concurrent=0)
    cuda.fail("cudaMallocHost")
    with pytest.raises(CudaError, match=r"cudaMallocHost\(65,536 bytes\) failed: out of memory"):
        made(cuda)
    arena = made(cuda)
    cuda.fail("cudaFreeHost", code=1)
    with pytest.raises(CudaError, match="cudaFreeHost failed"):
        arena.close()
    arena.close()
    assert cuda.report().live == 0


# Any order of events


class Lifetimes(RuleBasedStateMachine):
    """Arenas and tensors made, filled, moved, closed and dropped in any order: each tensor keeps its values.

    Drawn are indices, since hypothesis keeps what it samples from alive.
    """

    @initialize(version=st.sampled_from(VERSIONS), pages=st.booleans())
    def begin(self, version: int, pages: bool) -> None:
        self.end_of_test = contextlib.ExitStack()
        self.cuda = self.end_of_test.enter_context(fresh(version, capacity=MiB))
        self.cuda.attributes(concurrent=int(pages))
        self.pages = pages
        self.arenas: list[Arena] = []
        self.tensors: list[tuple[torch.Tensor, int]] = []  # each with the one number it is full of
        self.fills = 0

    @rule(pages=st.integers(1, 8))
    def allocate(self, pages: int) -> None:
        self.arenas.append(Arena(pages * 4 * KiB, HOST, self.cuda.runtime))

    @precondition(lambda self: self.arenas)
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        arena = self.arenas[data.draw(st.integers(0, len(self.arenas) - 1), "arena")]
        if arena.closed:
            return
        if any(t.untyped_storage().data_ptr() - arena._memory.pointer in range(arena.nbytes) for t, _ in self.tensors):
            return  # tensors of one test do not overlap
        size = data.draw(st.integers(1, arena.nbytes // 4), "size")
        offset = 4 * data.draw(st.integers(0, arena.nbytes // 4 - size), "offset")
        self.fills += 1
        tensor = arena.tensor(offset, (size,), torch.float32).fill_(self.fills)
        self.tensors.append((tensor, self.fills))

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def look_again(self, data: st.DataObject) -> None:
        tensor, value = self.tensors[data.draw(st.integers(0, len(self.tensors) - 1), "tensor")]
        self.tensors.append((tensor[: len(tensor) // 2 + 1].detach(), value))

    @precondition(lambda self: self.arenas)
    @rule(data=st.data(), location=st.sampled_from([0, CPU]))
    def prefetch(self, data: st.DataObject, location: int) -> None:
        arena = self.arenas[data.draw(st.integers(0, len(self.arenas) - 1), "arena")]
        if not arena.closed:
            arena.prefetch(0, arena.nbytes, location)

    @precondition(lambda self: self.arenas)
    @rule(data=st.data(), fails=st.booleans())
    def close(self, data: st.DataObject, fails: bool) -> None:
        arena = self.arenas[data.draw(st.integers(0, len(self.arenas) - 1), "arena")]
        frees = not arena._memory.views and arena._memory.pointer
        if fails and frees:
            self.cuda.fail("cudaFree" if arena.kind == "managed" else "cudaFreeHost", code=1)
            with pytest.raises(CudaError):
                arena.close()
        arena.close()
        arena.close()

    @precondition(lambda self: self.arenas)
    @rule(data=st.data())
    def drop_arena(self, data: st.DataObject) -> None:
        self.arenas.pop(data.draw(st.integers(0, len(self.arenas) - 1), "arena"))

    @precondition(lambda self: self.tensors)
    @rule(data=st.data())
    def drop_tensor(self, data: st.DataObject) -> None:
        self.tensors.pop(data.draw(st.integers(0, len(self.tensors) - 1), "tensor"))

    @precondition(lambda self: self.arenas)
    @rule(data=st.data())
    def drop_arena_in_a_cycle(self, data: st.DataObject) -> None:
        cycle: list[object] = [self.arenas.pop(data.draw(st.integers(0, len(self.arenas) - 1), "arena"))]
        cycle.append(cycle)
        del cycle
        gc.collect(1)

    @invariant()
    def check(self) -> None:
        for tensor, value in self.tensors:
            assert (tensor == value).all()
        needed = {t.untyped_storage().data_ptr() for t, _ in self.tensors} if self.tensors else set()
        report = self.cuda.report()
        assert not report.mistakes
        open_arenas = sum(not arena.closed for arena in self.arenas)
        assert open_arenas <= report.live <= open_arenas + len(needed)
        assert held(self.cuda.runtime, 0) == (report.live_bytes if self.pages else 0)

    def teardown(self) -> None:
        if not hasattr(self, "cuda"):
            return
        self.check()
        for arena in self.arenas:
            arena.close()
        self.check()
        self.arenas.clear()
        self.tensors.clear()
        self.end_of_test.close()
        assert held(self.cuda.runtime, 0) == 0


Lifetimes.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestLifetimes = Lifetimes.TestCase
