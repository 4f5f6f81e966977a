"""Sweeps: what a grid file comes to, who runs which cell, what becomes of a killed one, and the table's numbers."""

import csv
import doctest
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import qlora
import train.sweep.names
import train.sweep.report
from models.errors import ConfigError
from tests import tiny
from train.run import Run, read_metrics
from train.sweep import cells
from train.sweep.cells import taken
from train.sweep.grid import read_sweep
from train.sweep.names import cell_name
from train.sweep.report import interval

ROOT = Path(qlora.__file__).parent
SETTINGS = 'dtype = "float32"\nmax_steps = 2\nbatch_size = 2\naccumulation = 1\n'
GRID = '[grid]\n"lora.rank" = [2, 4]\noptimizer.learning_rate = [1e-3, 2e-2]\n'


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Settings that all the sweeps here share, as lines of TOML without a table but data."""
    directory = tmp_path_factory.mktemp("base")
    model, data = tiny.checkpoint(directory / "model"), tiny.records(directory / "colours.jsonl", 12)
    return f'model = "{model}"\n{SETTINGS}data.path = "{data}"\ndata.eval_size = 3\n'


@pytest.fixture
def sweep_file(base, tmp_path):
    def write(grid=GRID, more="seeds = 2\n", name="grid.toml"):
        path = tmp_path / name
        path.write_text(f'out = "{tmp_path / "out"}"\n{base}{more}{grid}')
        return path

    return write


def told(capsys, *arguments, code=0) -> Any:
    """The verb's JSON, and what it said to stderr."""
    assert qlora.main(["sweep", *map(str, arguments), "--quiet", "--json"]) == code
    out, err = capsys.readouterr()
    return (json.loads(out) if out else None), err


# What a file comes to


def test_a_grid_is_every_combination_with_every_seed_and_cells_are_single_ones(sweep_file):
    path = sweep_file(GRID + '[[cells]]\n"lora.rank" = 16\n[[cells]]\nlora.alpha = 1\nlora.rank = 2\n')
    sweep = read_sweep(path)
    assert [cell.name for cell in sweep.cells[:3]] == [
        "rank=2,lr=1e-3,seed=42",
        "rank=2,lr=1e-3,seed=43",
        "rank=2,lr=0.02,seed=42",
    ]
    assert [cell.name for cell in sweep.cells[-4::2]] == ["rank=16,seed=42", "alpha=1,rank=2,seed=42"]
    assert len(sweep.cells) == (2 * 2 + 2) * 2
    last = sweep.cells[-1].config
    assert (last.lora.alpha, last.lora.rank, last.seed, last.max_steps) == (1.0, 2, 43, 2)
    assert last.directory() == sweep.out / "alpha=1,rank=2,seed=43"
    assert {cell.config.data.seed for cell in sweep.cells} == {42}  # all are measured on the same examples


def test_presets_lie_under_files_and_files_under_the_sweeps_own_settings(base, tmp_path):
    (tmp_path / "run.toml").write_text("max_steps = 3\nlora.alpha = 5\nlog_every = 7\n")
    path = tmp_path / "grid.toml"
    path.write_text(
        f'preset = ["alpaca-33b", "lora-16bit"]\nconfig = "{tmp_path / "run.toml"}"\n{base}'
        "[grid]\n'lora.alpha' = [9]\n"
    )
    (cell,) = read_sweep(path).cells
    config = cell.config
    assert (config.quantize, config.lora.dropout, config.data.source_max_len) == (False, 0.05, 384)
    assert (config.log_every, config.max_steps, config.lora.alpha) == (7, 2, 9.0)


def test_seeds_are_a_number_from_the_settings_own_on_or_a_list_or_a_flag(sweep_file):
    assert read_sweep(sweep_file(more="seeds = 2\nseed = 7\n")).seeds == (7, 8)
    assert read_sweep(sweep_file(more="seeds = [5, 1]\n")).seeds == (5, 1)
    assert read_sweep(sweep_file(more="seeds = [5, 1]\n"), seeds=3).seeds == (42, 43, 44)
    assert read_sweep(sweep_file(more="")).seeds == (42,)


def test_seeds_may_vary_the_data_as_well_and_a_model_and_a_directory_stand_over_the_files(sweep_file, capsys):
    path = sweep_file(more="seeds = 2\nvary_data = true\n")
    sweep = read_sweep(path, model="other", out="elsewhere")
    assert {(cell.config.seed, cell.config.data.seed) for cell in sweep.cells} == {(42, 42), (43, 43)}
    assert {cell.config.model for cell in sweep.cells} == {"other"}
    assert all(cell.config.directory() == Path("elsewhere") / cell.name for cell in sweep.cells)
    printed = told(capsys, path, "--print", "--model", "other", "--out", "elsewhere")[0]["commands"]
    assert all(line.endswith("--model other --out elsewhere --quiet") for line in printed)
    with pytest.raises(ConfigError, match="vary_data: must be true or false"):
        read_sweep(sweep_file(more='vary_data = "yes"\n'))


def test_a_grid_over_epochs_takes_the_place_of_the_settings_steps(sweep_file):
    made = read_sweep(sweep_file(grid="[grid]\nepochs = [1, 2]\n", more=""))
    assert [(cell.config.max_steps, cell.config.epochs) for cell in made.cells] == [(None, 1.0), (None, 2.0)]


def test_everything_that_is_wrong_in_a_grid_is_listed_at_once(sweep_file):
    path = sweep_file(
        'max_stps = 4\n[grid]\n"lora.rnk" = [1, 2]\n"lora.rank" = [8, "many", 0]\nseed = [1]\n"lora.alpha" = 3\n'
        '[[cells]]\nlora_r = 8\n[[cells]]\n"data.pth" = "x"\n',
        more="seeds = 0\n",
    )
    with pytest.raises(ConfigError) as caught:
        read_sweep(path)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    for said in (
        f"{path}: max_stps: unknown key; did you mean max_steps?",
        f"{path}: [grid] lora.rnk: unknown key; did you mean lora.rank?",
        f'{path}: [grid] lora.rank: must be a whole number, not "many"',
        f"{path}: [grid] seed: seeds says which",
        f"{path}: [grid] lora.alpha: must be a list of values, not 3",
        f"{path}: [[cells]] 1: lora_r: unknown key; qlora.py's lora_r is lora.rank here",
        f"{path}: [[cells]] 2: data.pth: unknown key; did you mean data.path?",
        f"{path}: seeds: must be how many there are, or a list of different ones, not 0",
        f"{path}: lora.rank: lora: rank is 0; a rank is a whole number of at least 1 (cell rank=0)",
    ):
        assert said in lines
    assert len(lines) == len(set(lines))


def test_what_every_cell_lacks_is_said_once(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text('model = "m"\n[data]\npath = "d"\n' + GRID)
    with pytest.raises(ConfigError, match=r"^exactly one of max_steps and epochs .* \(every cell\)$"):
        read_sweep(path)


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ("", "nothing is varied"),
        ('[grid]\n"lora.rank" = [2, 2]\n', "the combination rank=2 is given twice"),
        ('[grid]\n"lora.rank" = [2]\n[[cells]]\n"lora.rank" = 2\n', "the combination rank=2 is given twice"),
        ('[grid]\nmodel = ["a/b", "a-b"]\n', "the combination model=a-b has the name of another one"),
        ('[grid]\nmodel = ["A", "a"]\n', "the combination model=a has the name of another one"),
        ('[grid]\nout = ["x"]\n', "each cell has a directory of its own"),
        ('[grid]\n"lora.rank" = []\n', "must be a list of values"),
    ],
)
def test_cells_that_could_not_be_told_apart_are_refused(sweep_file, grid, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_sweep(sweep_file(grid))


values = st.integers() | st.floats(allow_nan=False) | st.booleans() | st.text(max_size=60)


@given(rank=values, path=values)
def test_a_name_is_safe_and_short_and_no_shell_changes_it(rank, path):
    name = cell_name({"rank": rank, "data.path": path, "seed": 42})
    assert re.fullmatch(r"[A-Za-z0-9._+=,-]{1,160}", name)
    assert not name.startswith((".", "-"))
    assert shlex.quote(name) in (name, f"'{name}'")


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_and_its_neighbour_have_different_names_and_equal_ones_the_same(value):
    assert cell_name({"x": value}) != cell_name({"x": math.nextafter(value, math.inf)})
    assert cell_name({"x": 0.0}) == cell_name({"x": -0.0})
    assert float(train.sweep.names.number(value)) == value


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(train.sweep.names).failed == doctest.testmod(train.sweep.report).failed == 0


# Running


def test_a_sweep_runs_every_cell_and_its_table_holds_what_the_runs_measured(sweep_file, tmp_path, capsys, monkeypatch):
    path = sweep_file()
    report, _ = told(capsys, path)
    assert (report["done"], report["cells"], report["failed"]) == (8, 8, [])

    for row, rank, rate in zip(report["rows"], (2, 2, 4, 4), (1e-3, 2e-2) * 2, strict=True):
        assert row["point"] == {"lora.rank": rank, "optimizer.learning_rate": rate}
        name = f"rank={rank},lr={'1e-3' if rate == 1e-3 else '0.02'}"
        runs = [tmp_path / "out" / f"{name},seed={seed}" for seed in (42, 43)]
        losses = np.array([read_metrics(run)[-1]["loss"] for run in runs])
        assert all(read_metrics(run)[-1]["split"] == "eval" for run in runs)
        low, high = stats.t.interval(0.95, 1, loc=losses.mean(), scale=stats.sem(losses))
        found = row["measures"]["loss"]
        assert found["mean"] == pytest.approx(losses.mean())
        assert found["half"] == pytest.approx((high - low) / 2)
        timings = [read_metrics(run, "timing.jsonl") for run in runs]
        assert row["peak_memory"] == max(line["peak_memory"] for lines in timings for line in lines)
        assert row["seconds"] == pytest.approx(np.mean([sum(line["seconds"] for line in ls) for ls in timings]))
        assert (row["steps"], row["done"], row["cells"]) == (2, 2, 2)

    table = list(csv.DictReader((tmp_path / "out" / "sweep.csv").read_text().splitlines()))
    assert [line["lora.rank"] for line in table] == ["2", "2", "4", "4"]
    assert float(table[0]["loss_low"]) == pytest.approx(
        report["rows"][0]["measures"]["loss"]["mean"] - report["rows"][0]["measures"]["loss"]["half"]
    )
    text = (tmp_path / "out" / "sweep.md").read_text()
    assert "8 of 8 cells are done." in text
    found = report["rows"][3]["measures"]["loss"]
    assert f"| 4 | 0.02 | 2 | {found['mean']:.4f} ± {found['half']:.4f} | 2 |" in text
    assert sorted(p.name for p in (tmp_path / "out" / "plots").iterdir()) == [
        f"{name}.{ending}" for name in ("loss", "over-lr", "over-rank") for ending in ("png", "svg")
    ]
    assert "<!-- lora.rank -->" in (tmp_path / "out" / "plots" / "over-rank.svg").read_text()

    # A cell is a run as `qlora train` makes it, from the settings kept beside it.
    cell = tmp_path / "out" / "cells" / "rank=2,lr=0.02,seed=43.toml"
    again = ["train", "--config", str(cell), "--out", str(tmp_path / "again"), "--quiet", "--json"]
    assert qlora.main(again) == 0
    capsys.readouterr()
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / cell.stem / name).read_bytes()

    # What is done is not done again, and more seeds are added to what is there.
    monkeypatch.setattr(cells, "prepare", lambda config: pytest.fail("a cell that was done has been run again"))
    report, _ = told(capsys, path)
    assert report["done"] == 8
    report, _ = told(capsys, path, "--seeds", "3", "--table")
    assert (report["done"], report["cells"]) == (8, 12)
    assert "8 of 12 cells are done, 4 are missing." in (tmp_path / "out" / "sweep.md").read_text()
    commands, _ = told(capsys, path, "--seeds", "3", "--print")
    assert [shlex.split(line)[4] for line in commands["commands"]] == [
        f"rank={rank},lr={rate},seed=44" for rank in (2, 4) for rate in ("1e-3", "0.02")
    ]

    # A file that was changed meanwhile does not mix its runs with those of before.
    path.write_text(path.read_text().replace("max_steps = 2", "max_steps = 3"))
    _, err = told(capsys, path, code=2)
    assert "cell rank=2,lr=1e-3,seed=42 was begun with other settings: max_steps was 2 and is 3" in err


def test_a_failed_cell_is_listed_at_the_end_and_the_others_go_on(sweep_file, tmp_path, capsys):
    path = sweep_file('[grid]\n"lora.target_modules" = ["query", "q_proj"]\n', more="")
    report, err = told(capsys, path, code=2)
    assert "1 of 2 cells failed (--retry runs them again):\n  target_modules=query,seed=42: lora: no layer" in err
    assert (report["done"], [each["exit_code"] for each in report["failed"]]) == (1, [2])
    assert (tmp_path / "out" / "target_modules=q_proj,seed=42" / "STATUS").read_text() == "done\n"
    assert "- `target_modules=query,seed=42`: lora: no layer" in (tmp_path / "out" / "sweep.md").read_text()
    kept = json.loads((tmp_path / "out" / "cells" / "target_modules=query,seed=42.failed").read_text())
    assert "Traceback" in kept["traceback"]


def test_a_failed_cell_is_run_again_only_when_asked(sweep_file, tmp_path, capsys, monkeypatch):
    path = sweep_file('[grid]\n"lora.rank" = [2]\n', more="")
    with monkeypatch.context() as broken:
        broken.setattr(cells, "prepare", lambda config: 1 / 0)
        _, err = told(capsys, path, code=1)
        assert "division by zero" in err
    _, err = told(capsys, path, code=1)
    assert "division by zero" in err
    report, _ = told(capsys, path, "--retry")
    assert report["done"] == 1
    assert not (tmp_path / "out" / "cells" / "rank=2,seed=42.failed").exists()


def test_a_cell_that_another_worker_has_is_left_to_it(sweep_file, tmp_path, capsys):
    path = sweep_file('[grid]\n"lora.rank" = [2, 4]\n', more="")
    with taken(tmp_path / "out" / "cells" / "rank=2,seed=42.lock") as mine:
        assert mine
        report, err = told(capsys, path)
    assert "1 cell is being run by others" in err
    assert report["done"] == 1
    assert not (tmp_path / "out" / "rank=2,seed=42").exists()
    assert "1 of 2 cells are done, 1 is missing." in (tmp_path / "out" / "sweep.md").read_text()


def test_a_printed_command_runs_its_cell(sweep_file, tmp_path, capsys):
    path = sweep_file('[grid]\n"lora.rank" = [2, 4]\n', more="", name="a grid.toml")
    commands, _ = told(capsys, path, "--print", "--seeds", "1")
    assert not (tmp_path / "out").exists()
    words = shlex.split(commands["commands"][1])
    assert words[:3] == ["qlora", "sweep", str(path)]
    assert qlora.main(words[1:]) == 0
    capsys.readouterr()
    assert {p.name for p in (tmp_path / "out").glob("rank*")} == {"rank=4,seed=42"}
    _, err = told(capsys, path, "--only", "rank=4,sed=42", code=2)
    assert "has no cell 'rank=4,sed=42'; did you mean rank=4,seed=42?" in err


def test_nothing_done_is_a_report_too(sweep_file, tmp_path, capsys):
    report, _ = told(capsys, sweep_file(), "--table")
    assert (report["done"], report["plots"]) == (0, [])
    text = (tmp_path / "out" / "sweep.md").read_text()
    assert "0 of 8 cells are done, 8 are missing." in text
    assert "| 2 | 1e-3 | 0 of 2 | – | – | – |" in text


def test_an_accuracy_is_reported_beside_the_loss(sweep_file, tmp_path, capsys):
    path = sweep_file('[grid]\n"lora.rank" = [2, 4]\n', more="seeds = 2\n")
    sweep = read_sweep(path)
    for number, cell in enumerate(sweep.cells):
        run = Run.create(sweep.out / cell.name, cell.config)
        run.metrics(1, "train", loss=2.0, lr=1e-3)
        run.timing(1, seconds=1.5, peak_memory=2**30)
        run.metrics(1, "eval", loss=1.0, labels=9, accuracy=0.5 + 0.1 * number)
        run.status("done")
    report, _ = told(capsys, path, "--table")
    assert [row["measures"]["accuracy"]["mean"] for row in report["rows"]] == pytest.approx([0.55, 0.75])
    assert set(report["rows"][0]["measures"]) == {"loss", "accuracy"}
    assert "| rank | seeds | held-out loss | held-out accuracy |" in (tmp_path / "out" / "sweep.md").read_text()
    assert "<!-- held-out accuracy -->" in (tmp_path / "out" / "plots" / "over-rank.svg").read_text()


def test_one_seed_has_no_interval_and_more_have_students():
    assert interval([3.0]) == train.sweep.report.Interval(3.0, None, 1)
    sample = [2.0, 2.5, 2.2, 2.9]
    assert interval(sample).half == pytest.approx(3.182446 * np.std(sample, ddof=1) / 2)  # t(0.975, 3), by the table


# Processes


def start(*arguments) -> subprocess.Popen:
    """Start a sweep as a person would, with one thread: cores are few, and waiting for each other is slow."""
    command = [sys.executable, "-m", "qlora", "sweep", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for_step(metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (metrics.exists() and f'"step": {step}, "split": "train"' in metrics.read_text()):
        assert time.monotonic() < deadline, "no step was made in two minutes"
        time.sleep(0.02)


def test_two_workers_share_the_cells_and_run_none_twice(sweep_file, tmp_path):
    process = start(sweep_file(more=""), "--workers", "2")
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    done = re.findall(r"^(rank=\S+): done$", err, re.MULTILINE)
    assert sorted(done) == [f"rank={rank},lr={rate},seed=42" for rank in (2, 4) for rate in ("0.02", "1e-3")]
    assert "4 of 4 cells are done" in (tmp_path / "out" / "sweep.md").read_text()
    assert "4 of 4 cells are done, 0 missing" in out


def test_a_killed_workers_cell_is_taken_up_again_and_ends_as_if_nothing_had_been(sweep_file, tmp_path, capsys):
    path = sweep_file('[grid]\n"lora.rank" = [2]\n', more="seeds = 1\n")
    path.write_text(path.read_text().replace("max_steps = 2", "max_steps = 12\nsave_steps = 2"))
    run = tmp_path / "out" / "rank=2,seed=42"
    process = start(path)
    wait_for_step(run / "metrics.jsonl", 3)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    sweep = read_sweep(path)
    assert cells.state(sweep, sweep.cells[0]) == "interrupted"

    report, _ = told(capsys, path)
    assert report["done"] == 1
    assert "going on after step" in (run / "log.txt").read_text()
    whole = ["train", "--config", str(tmp_path / "out/cells/rank=2,seed=42.toml"), "--out", str(tmp_path / "whole")]
    assert qlora.main([*whole, "--quiet"]) == 0
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("workers", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_ends_the_sweep_after_the_cell_has_saved(sweep_file, tmp_path, workers, number):
    path = sweep_file('[grid]\n"lora.rank" = [2]\n', more="seeds = 1\n")
    path.write_text(path.read_text().replace("max_steps = 2", "max_steps = 100000"))
    process = start(path, "--workers", workers)
    wait_for_step(tmp_path / "out" / "rank=2,seed=42" / "metrics.jsonl", 1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert re.fullmatch(r"interrupted@\d+\n", (tmp_path / "out" / "rank=2,seed=42" / "STATUS").read_text())
    assert (tmp_path / "out" / "rank=2,seed=42" / "adapter" / "adapter_model.safetensors").exists()
    assert "0 of 1 cells are done, 1 is missing." in (tmp_path / "out" / "sweep.md").read_text()
