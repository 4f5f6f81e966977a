"""However one process of a job fails, all end within seconds, and the person is told once why."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from models.errors import DataError, PeerError
from models.parallel import world
from models.parallel.board import address, is_gone, neighbours
from models.parallel.collectives import collective, is_late, is_of_collective, said
from models.parallel.failure import watched
from models.parallel.watch import in_words
from tests.failing import Jobs

SOON = 8.0
"""Seconds; waiting for each other takes 2 of them where somebody hangs, and the rest is for a busy machine."""


@pytest.fixture(scope="module")
def jobs():
    running = Jobs()
    yield running
    running.close()


def told(ended):
    """What the person was told, and by which processes."""
    lines = [(rank, line) for rank, text in enumerate(ended["said"]) for line in text.splitlines()]
    return [(rank, line.removeprefix("told: ")) for rank, line in lines if line.startswith("told: ")]


@pytest.mark.parametrize(
    ("does", "codes", "tells", "text"),
    [
        (("sums", "error"), [9, 1], 0, "process 1 failed: ZeroDivisionError: by hand"),
        (("error", "sums"), [1, 9], 0, "by hand"),
        (("sums", "refusal"), [9, 3], 0, "process 1 failed: line 3 is bad"),
        (("sums", "sums", "refusal"), [9, 9, 3], 0, "process 2 failed: line 3 is bad"),
        (("sums", "exit"), [9, 3], 0, "process 1 ended with exit code 3"),
        (("sums", "os exit"), [9, 7], 0, "process 1 is gone: it has crashed, or was killed, as when memory runs out"),
        (("sums", "kill"), [9, -9], 0, "process 1 is gone: it has crashed, or was killed, as when memory runs out"),
        (("kill", "sums"), [-9, 9], 1, "process 0 is gone: it has crashed, or was killed, as when memory runs out"),
        (("sums", "before: refusal"), [9, 3], 0, "process 1 failed: line 3 is bad"),
        (("before: refusal", "sums"), [3, 9], 0, "line 3 is bad"),
        (("own runtime error", "sums"), [1, 9], 0, "a shape is wrong"),
    ],
)
def test_the_others_end_with_the_reason(jobs, does, codes, tells, text):
    ended = jobs.run(*does)
    assert ended["codes"] == codes
    assert told(ended) == [(tells, text)]
    assert ended["seconds"] < SOON


def test_what_is_a_mistake_shows_where_it_was_made(jobs):
    ended = jobs.run("sums", "error")
    assert "ZeroDivisionError" in ended["said"][1]
    assert "Traceback" not in ended["said"][0]


@pytest.mark.parametrize("when", ["", "before: "])
def test_what_all_run_into_is_told_once_with_its_own_code(jobs, when):
    ended = jobs.run(f"{when}late refusal", f"{when}refusal", f"{when}refusal")
    assert ended["codes"] == [3, 3, 3]
    assert told(ended) == [(0, "line 3 is bad")]


@pytest.mark.parametrize("main", ["sums", "stuck"])
def test_the_person_is_told_before_a_launcher_kills_those_that_are_left(jobs, main):
    ended = jobs.run(main, "refusal", launcher="kills")
    assert told(ended) == [(0, "process 1 failed: line 3 is bad")]
    assert ended["codes"][1] == 3


@pytest.mark.parametrize(
    ("does", "where"),
    [
        (("sums", "hang"), "all_reduce (the sums of step 5)"),
        (("hang", "barrier"), "barrier"),
        (("from main", "hang"), "broadcast_object_list"),
        (("from all", "hang"), "all_gather_object"),
        (("recv", "hang"), "recv"),
        (("ddp", "ddp, hang"), "all_reduce"),
        (("fsdp", "fsdp, hang before forward"), "all_gather_into_tensor"),
        (("fsdp", "fsdp, hang in backward"), "reduce_scatter_tensor"),
        (("nothing", "hang"), "the end"),
        (("sums", "before: hang"), "the start"),
    ],
)
def test_who_does_not_come_is_named_and_what_it_kept_waiting(jobs, does, where):
    ended = jobs.run(*does)
    hung = next(rank for rank, what in enumerate(does) if "hang" in what)
    [(_, text)] = told(ended)
    joint = "at" if where.startswith("the ") else "in"
    assert text == (f"no answer within 2 s {joint} {where}; process {hung} did not come (it was at a long sleep)")
    assert ended["codes"] == [9, 9]
    assert "time.sleep(60)" in ended["said"][hung]  # it says where it is
    assert "time.sleep(60)" not in ended["said"][1 - hung]
    assert ended["seconds"] < SOON + 6  # torch imports much for FSDP


def test_of_three_those_that_wait_say_for_what(jobs):
    ended = jobs.run("sums", "barrier", "hang")
    assert ended["codes"] == [9, 9, 9]
    [(_, text)] = told(ended)
    assert "process 2 did not come" in text
    assert "process 1 did not come" not in text
    assert "process 1 waited in barrier" in text or "process 0 waited in all_reduce" in text


@pytest.mark.parametrize("other", ["kill", "error"])
def test_a_process_that_is_stuck_has_last_words_and_is_ended(jobs, other):
    ended = jobs.run("stuck", other)
    [(_, text)] = told(ended)
    assert ended["codes"][0] == 9
    assert f"last words: {text}" in ended["said"][0]  # though another hook has failed
    assert "ZeroDivisionError: in a hook" in ended["said"][0]
    assert ended["seconds"] < SOON


def test_an_end_in_good_order_is_no_failure(jobs):
    assert jobs.run("nothing", "rest")["codes"] == [0, 0]
    ended = jobs.run("saves and stops", "stops")
    assert (ended["codes"], ended["said"]) == ([143, 143], ["", ""])
    ended = jobs.run("sums", "stops")
    assert ended["codes"] == [9, 143]
    assert "process 1 has come to its end" in ended["said"][0]


def test_without_a_launcher_the_main_process_keeps_the_store(jobs):
    assert jobs.run("sums", "sums", launcher="lacks")["codes"] == [0, 0]
    ended = jobs.run("sums", "refusal", launcher="lacks")
    assert ended["codes"] == [9, 3]
    assert told(ended) == [(0, "process 1 failed: line 3 is bad")]
    ended = jobs.run("kill", "sums", launcher="lacks")
    assert ended["codes"] == [-9, 9]
    assert "process 0 is gone" in ended["said"][1]


def test_without_their_launcher_processes_save_and_stop(jobs):
    ended = jobs.run("until asked", "until asked", launcher="dies")
    assert ended["codes"] == [143, 143]
    assert "the launcher is gone" in ended["said"][0]


# Alone


def test_a_process_of_its_own_tells_its_own_errors():
    seen = []
    with pytest.raises(DataError), watched(seen.append), world.world("cpu"):
        raise DataError("bad")
    assert [str(error) for error in seen] == ["bad"]
    with pytest.raises(RuntimeError, match="gloo/transport"), world.doing("sums"):
        raise RuntimeError("gloo/transport: an error that cannot be of a collective")


def test_errors_of_the_network_are_told_from_others():
    broken = RuntimeError("[/a/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:5. Check the logs.")
    late = RuntimeError("[/a/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation")
    assert is_of_collective(broken)
    assert is_of_collective(late)
    assert is_of_collective(dist.DistBackendError("NCCL watchdog"))
    assert not is_of_collective(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_of_collective(torch.OutOfMemoryError("NCCL error: out of memory"))
    assert not is_of_collective(ValueError("gloo/transport"))
    assert (is_late(broken), is_late(late)) == (False, True)
    assert said(broken) == "Connection closed by peer [::1]:5"


def test_a_collective_is_named_by_what_was_called():
    store = dist.HashStore()

    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="invalid root rank") as caught:
            dist.broadcast_object_list([1], src=5)
    finally:
        dist.destroy_process_group()
    assert collective(caught.value) == "broadcast_object_list"
    assert collective(RuntimeError("never raised")) == "a collective"


def test_a_process_is_gone_before_its_parent_has_noticed():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not is_gone(child.pid)
    child.communicate(b"\n")
    assert is_gone(child.pid)
    unnoticed = os.fork()
    if unnoticed == 0:
        os._exit(0)
    os.waitid(os.P_PID, unnoticed, os.WEXITED | os.WNOWAIT)
    assert is_gone(unnoticed)
    os.waitpid(unnoticed, 0)


def test_only_processes_that_see_each_other_are_neighbours():
    here = address().rpartition(" ")[0]
    assert neighbours({0: f"{here} 17", 1: "another machine 18", 2: address()}) == {0: 17, 2: os.getpid()}


def test_an_end_is_put_into_words():
    with_plan = RuntimeError("out of memory")
    with_plan.add_note("half the batch would fit")
    assert in_words(with_plan) == "failed: RuntimeError: out of memory\nhalf the batch would fit"
    assert in_words(PeerError("process 1 failed")) == "failed: process 1 failed"
    assert in_words(MemoryError()) == "failed: MemoryError"
    assert in_words(KeyboardInterrupt()) == "was interrupted"
    assert in_words(SystemExit(3)) == "ended with exit code 3"
