"""Ratios and verdicts, from given numbers."""

import pytest

from benchmarks import targets
from benchmarks.training import judged as judged_training


def test_a_ratio_is_our_time_over_theirs():
    assert targets.against({"ours": 3.0, "bitsandbytes": 12.0, "dense": 2.0}) == {
        "vs_bitsandbytes": 0.25,
        "vs_dense": 1.5,
    }


@pytest.mark.parametrize(("figure", "met"), [(0.29, True), (0.30, True), (0.31, False)])
def test_a_ratio_of_times_must_not_exceed_its_target(figure, met):
    row = targets.judged({"vs_bitsandbytes": figure}, {"vs_bitsandbytes": 0.30})
    assert row["targets"] == {"vs_bitsandbytes": {"target": 0.30, "met": met}}


@pytest.mark.parametrize(("figure", "met"), [(0.84, False), (0.85, True), (0.9, True)])
def test_a_share_of_the_bandwidth_must_reach_its_target(figure, met):
    row = targets.judged({"bandwidth_share": figure}, {"bandwidth_share": 0.85})
    assert row["targets"]["bandwidth_share"]["met"] is met


def test_a_figure_that_was_not_measured_is_neither_met_nor_missed():
    assert targets.judged({"vs_dense": 1.0}, {"vs_bitsandbytes": 0.3})["targets"] == {}


def test_a_verdict_says_which_way_the_target_lies():
    row = targets.judged({"vs_dense": 1.25, "bandwidth_share": 0.6}, {"vs_dense": 0.9, "bandwidth_share": 0.5})
    assert targets.verdicts(row) == [
        ("vs_dense", "1.25", "≤ 0.9", "missed"),
        ("bandwidth_share", "0.6", "≥ 0.5", "met"),
    ]


def test_training_is_held_to_twice_the_speed_and_six_tenths_of_the_memory():
    row = {
        "ours_tokens_s": 500.0,
        "peer_tokens_s": 200.0,
        "ours_peak_above_start": 30,
        "peer_peak_above_start": 40,
        "ours_peak": 60,
        "peer_peak": 100,
    }
    found = judged_training(row)
    assert (found["speed_ratio"], found["peak_above_start_ratio"], found["peak_ratio"]) == (2.5, 0.75, 0.6)
    assert {name: held["met"] for name, held in found["targets"].items()} == {
        "speed_ratio": True,
        "peak_ratio": True,
        "peak_above_start_ratio": False,
    }


def test_without_the_peer_training_is_held_to_nothing():
    assert judged_training({"ours_tokens_s": 500.0}) == {"ours_tokens_s": 500.0, "targets": {}}
