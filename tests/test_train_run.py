"""The run directory: what is in it, that nothing in it is half-written, and when it is refused."""

import json
import os
import platform

import pytest
import torch

import models.files
from models.errors import ConfigError, WriteError
from models.files import append_line, write_whole
from train.config import read_config
from train.loop import LoopConfig
from train.memory import peak_memory_bytes
from train.run import Run, read_metrics

CONFIG = LoopConfig(max_steps=3)


def test_a_new_run_has_its_files_and_says_running(tmp_path):
    run = Run.create(tmp_path / "runs" / "one", CONFIG, argv=["train", "--x"], data={"a.jsonl": "00ff"})
    run.write_data({"examples": 3}, "preview")
    names = {str(path.relative_to(run.directory)) for path in run.directory.rglob("*") if path.is_file()}
    wanted = ".lock config.toml env.json log.txt metrics.jsonl timing.jsonl STATUS data/manifest.json data/preview.txt"
    assert names == set(wanted.split())
    assert (run.directory / "STATUS").read_text() == "running\n"
    assert read_config(LoopConfig, run.directory / "config.toml") == CONFIG
    assert json.loads((run.directory / "data/manifest.json").read_text()) == {"examples": 3}


def test_env_json_says_what_it_takes_to_repeat_the_run(tmp_path):
    Run.create(tmp_path / "run", CONFIG, argv=["train", "--x"], data={"a.jsonl": "00ff"})
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert env["argv"] == ["train", "--x"]
    assert env["data"] == {"a.jsonl": "00ff"}
    assert env["python"] == platform.python_version()
    assert env["packages"]["torch"] == torch.__version__
    assert env["device"] == "cpu"
    assert env["commit"] is None or len(env["commit"].removesuffix("+changes")) == 40
    assert platform.node() not in json.dumps(env)


def test_lines_are_appended_whole_and_read_back(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    run.metrics(1, "train", loss=0.5)
    run.metrics(1, "eval", loss=0.25, labels=3)
    run.timing(1, seconds=2.0)
    assert read_metrics(run.directory) == [
        {"step": 1, "split": "train", "loss": 0.5},
        {"step": 1, "split": "eval", "loss": 0.25, "labels": 3},
    ]
    assert read_metrics(run.directory, "timing.jsonl") == [{"step": 1, "seconds": 2.0}]
    assert (run.directory / "metrics.jsonl").read_bytes().endswith(b"}\n")


def test_each_line_is_one_write(tmp_path, monkeypatch):
    written = []

    class Recorder:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            written.append(data)
            return len(data)

    monkeypatch.setattr(models.files, "open", lambda *_, **__: Recorder(), raising=False)
    append_line(tmp_path / "x", "a line")
    assert written == [b"a line\n"]


def test_an_error_becomes_the_status_and_its_traceback_the_log(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match="out of luck"), run, run:
        raise ValueError("out of luck\nand more")
    assert (run.directory / "STATUS").read_text() == "failed: out of luck\n"
    assert "Traceback" in (run.directory / "log.txt").read_text()


def test_an_error_without_words_is_named_by_its_class(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    with pytest.raises(MemoryError), run:
        raise MemoryError
    assert (run.directory / "STATUS").read_text() == "failed: MemoryError\n"


def test_ctrl_c_becomes_the_status_with_the_last_step(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    run.metrics(2, "train", loss=0.5)
    with pytest.raises(KeyboardInterrupt), run:
        raise KeyboardInterrupt
    assert (run.directory / "STATUS").read_text() == "interrupted@2\n"


def test_a_metric_that_json_cannot_hold_is_never_written(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    with pytest.raises(AssertionError, match="loss is nan"):
        run.metrics(1, "train", loss=float("nan"))


# Directories that are taken


def test_a_directory_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"is not empty \(it holds thesis.tex\); give another --out, or --over"):
        Run.create(tmp_path, CONFIG)


def test_overwriting_removes_the_run_and_nothing_else(tmp_path):
    with Run.create(tmp_path, CONFIG) as run:
        run.metrics(1, "train", loss=0.5)
        run.write_json("eval/perplexity.json", {})
    (tmp_path / "notes.txt").write_text("mine")
    Run.create(tmp_path, LoopConfig(epochs=1.0), overwrite=True)
    assert read_metrics(tmp_path) == []
    assert not (tmp_path / "eval").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwriting_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"holds adapter, thesis\.tex but no run"):
        Run.create(tmp_path, CONFIG, overwrite=True)
    assert (tmp_path / "adapter").is_dir()


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="exists and is a file"):
        Run.create(tmp_path / "run", CONFIG, overwrite=True)


def test_what_is_no_run_or_damaged_is_refused_when_read(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run: it has no metrics\.jsonl"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl is damaged"):
        read_metrics(tmp_path)


# Files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_whole(tmp_path / "deep" / "file", "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "deep" / "file", "new")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]
    assert (tmp_path / "deep" / "file").read_text() == "old"


def test_peak_memory_counts_bytes_and_never_falls():
    before = peak_memory_bytes()
    ballast = torch.ones(64 * 2**20, dtype=torch.uint8)
    during = peak_memory_bytes()
    del ballast
    slack = 2**21  # Linux keeps its counters by processor and adds them up when it likes
    assert 2**25 < before <= during + slack <= peak_memory_bytes() + 2 * slack < 2**40


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file/run cannot be written: Not a directory; make room, or give another"):
        Run.create(tmp_path / "file" / "run", LoopConfig(max_steps=1))
