"""Turns and medians, told by a clock that the test moves."""

import pytest
import torch

from benchmarks.timing import GraphClock, Rotation, Timing, copy_bandwidth, interleaved, stopwatch


class Clock:
    """Time that passes only when work is done."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now

    def work(self, name, durations):
        """A contestant that takes these times, one call after the other."""
        left = iter(durations)

        def call():
            self.log.append(name)
            self.now += next(left)

        return call

    def seconds(self, work):
        return stopwatch(work, self)


def test_contestants_take_turns_after_a_call_each_to_warm_up():
    clock = Clock()
    interleaved({n: clock.work(n, [1] * 4) for n in "abc"}, 3, clock.seconds)
    assert "".join(clock.log) == "abc" * 4


def test_each_is_told_by_the_median_of_its_own_turns_without_the_warm_up():
    clock = Clock()
    contestants = {"slow": clock.work("slow", [100, 5, 9, 6]), "quick": clock.work("quick", [50, 1, 3, 40])}
    found = interleaved(contestants, 3, clock.seconds)
    assert found == {"slow": Timing(6, 5, 9, 3), "quick": Timing(3, 1, 40, 3)}


def test_a_rotation_makes_every_call_and_is_told_by_one_of_them():
    clock = Clock()
    rotation = Rotation([clock.work("first", [9, 1]), clock.work("second", [9, 5])])
    found = interleaved({"ours": rotation}, 1, clock.seconds)
    assert clock.log == ["first", "second"] * 2
    assert found["ours"].median == 3


def test_a_rotation_keeps_the_results_of_all_its_calls():
    assert Rotation([lambda: "a", lambda: "b"])() == ["a", "b"]


def test_the_default_clock_is_of_this_machine():
    assert interleaved({"nothing": lambda: None}, 2)["nothing"].fastest >= 0


def test_no_repeats_have_no_median():
    with pytest.raises(ValueError, match="repeats is 0; a median needs at least 1"):
        interleaved({}, 0)


@pytest.fixture
def events(monkeypatch):
    """CUDA events on the test's clock, in milliseconds as they are."""
    clock = Clock()

    class Event:
        def __init__(self, enable_timing):
            self.at = 0.0

        def record(self):
            self.at = clock()

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return clock


def test_on_a_gpu_a_time_is_that_of_one_replay_after_one_to_warm_up(events):
    assert GraphClock(replays=3, record=False)(events.work("ours", [100, 1, 2, 6])) == 3
    assert events.log == ["ours"] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_what_was_recorded():
    x, called = torch.ones(1024, device="cuda"), []
    clock = GraphClock(replays=4)
    assert 0 < clock(lambda: called.append(x.add_(1))) < 1
    assert len(called) == 2  # on the side stream, and when it was recorded
    assert 1e9 < copy_bandwidth("cuda", 1, 2**26) < 1e14
