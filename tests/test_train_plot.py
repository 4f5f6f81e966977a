"""The loss plot: drawn from metrics.jsonl alone, for one run and for several."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train.plot
from models.errors import ConfigError
from train.loop import LoopConfig
from train.plot import plot_runs, smooth
from train.run import Run


def a_run(directory, steps=40):
    run = Run.create(directory, LoopConfig(max_steps=max(1, steps)))
    for step in range(1, steps + 1):
        run.metrics(step, "train", loss=2 + 1 / step, lr=2e-4, grad_norm=0.1, labels=10, tokens=20)
        if step % 20 == 0:
            run.metrics(step, "eval", loss=2.1, labels=10)
    return directory


def test_a_run_is_drawn_with_titles_units_and_a_legend(tmp_path):
    png, svg = plot_runs([a_run(tmp_path / "guanaco")], tmp_path / "plots" / "loss.png")
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert png.stat().st_size > 20_000
    text = svg.read_text()
    for said in (
        "guanaco",
        "loss per label token (nats)",
        "learning rate",
        "optimizer step",
        "training",
        "held out",
    ):
        assert f"<!-- {said}" in text


def test_several_runs_are_told_apart_by_name(tmp_path):
    svg = plot_runs([a_run(tmp_path / "one"), a_run(tmp_path / "two")], tmp_path / "both.png")[1].read_text()
    assert "<!-- one -->" in svg
    assert "<!-- two -->" in svg


def test_runs_of_one_name_are_told_apart_by_path(tmp_path):
    runs = [a_run(tmp_path / "a" / "run"), a_run(tmp_path / "b" / "run")]
    svg = plot_runs(runs, tmp_path / "both.png")[1].read_text()
    assert "b/run -->" in svg


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_ended_early_is_drawn_as_far_as_it_went(tmp_path, steps):
    assert all(file.stat().st_size for file in plot_runs([a_run(tmp_path / "run", steps)], tmp_path / "loss"))


@given(values=st.lists(st.floats(-10, 10), min_size=1), window=st.floats(0.1, 50))
def test_a_running_mean_starts_at_the_first_value_and_stays_within_the_values(values, window):
    means = smooth(values, window)
    assert means[0] == values[0]
    assert all(min(values) - 1e-9 <= mean <= max(values) + 1e-9 for mean in means)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(train.plot).failed == 0


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no run to plot"):
        plot_runs([], tmp_path / "loss.png")
    with pytest.raises(ConfigError, match="is not a run"):
        plot_runs([tmp_path], tmp_path / "loss.png")
