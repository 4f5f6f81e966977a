"""A run that was killed anywhere, any number of times, ends as one that never was: the same metrics, the same adapters.

Processes here are real and die of SIGKILL. Their directories are in memory where the system has such a place: what is
tested is the order of operations, and a disk would only make each sync slower.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import qlora
from models.errors import ConfigError
from models.fingerprint import fingerprint
from models.lock import Held, lock, unlock
from tests import tiny
from tests.killing import Killer
from train.checkpoint import checkpoints, problem
from train.optimizer import NAMES
from train.run import Run

STEPS = 5
SAME = ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "data/manifest.json")
# Dropout, accumulation that does not divide an epoch, three epochs in another order each, evaluations between.
SETTINGS = (
    f"--max-steps {STEPS} --batch-size 2 --accumulation 2 --eval-steps 2 --save-steps 1 --keep-checkpoints 2 "
    "--lora.rank 2 --lora.dropout 0.2 --data.eval-size 2 --dtype float32 --device cpu --quiet"
)
STRIDE = 52  # operations between two kills of one optimizer's runs; each optimizer starts elsewhere


@pytest.fixture(scope="module")
def folder():
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def killer():
    killer = Killer()
    yield killer
    killer.close()


@pytest.fixture(scope="module")
def command(folder):
    """The command line that trains under an optimizer into a directory."""
    model, data = tiny.checkpoint(folder / "model"), tiny.records(folder / "colours.jsonl", 8)

    def make(out, optimizer="adamw", *more):
        rate = "3e-3" if optimizer == "lion" else "2e-2"
        flags = [*SETTINGS.split(), "--optimizer.name", optimizer, "--optimizer.learning-rate", rate, *more]
        return ["train", "--model", str(model), "--data.path", str(data), "--out", str(out), *flags]

    return make


@pytest.fixture(scope="module")
def whole(folder, killer, command):
    """Runs that were never killed, by optimizer, and the operations on files that each made."""
    made = {}

    def get(optimizer):
        if optimizer not in made:
            out = folder / f"whole-{optimizer}"
            ended = killer.run(*command(out, optimizer), within=str(out))
            assert ended["code"] == 0, ended["stderr"]
            made[optimizer] = out, ended["operations"]
        return made[optimizer]

    return get


def finish(killer, command, out):
    """Go on with a run to its end, or begin it again if it was killed before it was one."""
    ended = killer.run("resume", out, "--quiet")
    if ended["code"] == 2 and "holds no run" in ended["stderr"]:
        ended = killer.run(*command)
    assert ended["code"] == 0, ended["stderr"]
    return ended


def assert_same(run, whole):
    for name in SAME:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    last = checkpoints(run / "checkpoints")[0], checkpoints(whole / "checkpoints")[0]
    assert last[0].name == last[1].name == f"step-{STEPS:06d}"
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
    assert len(checkpoints(run / "checkpoints")) == 2
    assert (run / "STATUS").read_text() == "done\n"
    left = [path.name for path in run.rglob(".*") if path.name != ".lock"]
    assert left == [], "a killed writer's files are removed"


@pytest.mark.parametrize("optimizer", NAMES)
def test_a_run_killed_at_an_operation_on_files_ends_like_one_that_was_not(folder, killer, command, whole, optimizer):
    expected, operations = whole(optimizer)
    assert len(operations) > 300
    first = 1 + NAMES.index(optimizer) * STRIDE // len(NAMES)
    for at in range(first, len(operations) + 1, STRIDE):
        out = folder / "killed"
        died = killer.run(*command(out, optimizer), within=str(out), at=at)
        assert died["code"] == -signal.SIGKILL
        again = killer.run("resume", out, "--quiet", within=str(out), at=at % 89 + 1)  # and once more on the way
        assert again["code"] in (-signal.SIGKILL, 0, 2)
        finish(killer, command(out, optimizer), out)
        assert_same(out, expected)
        shutil.rmtree(out)


@pytest.mark.parametrize("optimizer", NAMES)
def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(folder, killer, command, whole, optimizer):
    expected, _ = whole(optimizer)
    draw = random.Random(optimizer)
    out = folder / "killed"
    start = time.monotonic()
    ended = killer.run(*command(out, optimizer))  # how long it takes with the load that there is now
    assert_same(out, expected)
    length = time.monotonic() - start
    shutil.rmtree(out)

    killed = 0
    while killed < 6:
        ended = killer.run(*command(out, optimizer), after=draw.uniform(0, length))
        while ended["code"] == -signal.SIGKILL and killed < 6:
            killed += 1
            ended = killer.run("resume", out, "--quiet", after=draw.uniform(0, length))
        finish(killer, command(out, optimizer), out)
        assert_same(out, expected)
        shutil.rmtree(out)


def test_what_killed_writers_have_left_is_removed(killer, whole):
    run, _ = whole("adamw")
    left = [run / ".STATUS.12.tmp", run / "adapter" / ".tmpAbC123", run / "adapter" / ".adapter_model.partial"]
    for path in left:
        path.touch()
    assert killer.run("resume", run)["code"] == 0
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("more", [("--data.pack", "--data.max-len", "96"), ("--no-adapters", "--no-quantize")])
def test_packed_rows_and_every_weight_go_on_alike(folder, killer, command, more):
    whole, out = folder / f"whole{more[0]}", folder / "killed"
    ended = killer.run(*command(whole, "adamw", *more), within=str(whole))
    assert ended["code"] == 0, ended["stderr"]
    files = ["metrics.jsonl", *(str(p.relative_to(whole)) for p in whole.glob("*/*.safetensors"))]
    assert len(files) == 2
    for at in range(90, len(ended["operations"]), 110):
        assert killer.run(*command(out, "adamw", *more), within=str(out), at=at)["code"] == -signal.SIGKILL
        finish(killer, command(out, "adamw", *more), out)
        assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in files)
        assert [path.name for path in out.rglob(".*") if path.name != ".lock"] == []
        shutil.rmtree(out)


# Interrupted


def started(command, out, *more):
    """A run in a process of its own that would take forever, once it has made a step."""
    flags = [*command(out), "--max-steps", "100000", "--save-steps", "100000", *more]
    process = subprocess.Popen([sys.executable, "-m", "qlora", *flags], cwd=Path(qlora.__file__).parent)
    wait_for(lambda: (out / "metrics.jsonl").exists() and '"train"' in (out / "metrics.jsonl").read_text())
    return process


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def last_step(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def test_sigterm_saves_a_whole_checkpoint_and_touching_save_saves_at_once(command, folder, killer):
    out = folder / "terminated"
    process = started(command, out)
    try:
        (out / "save").touch()
        wait_for(lambda: not (out / "save").exists())
        asked = checkpoints(out / "checkpoints")
        assert len(asked) == 1
        refused = killer.run("resume", out)
        assert refused["code"] == 2
        assert "is being written by a process that is still running" in refused["stderr"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    finally:
        process.kill()
        process.wait()
    step = last_step(out)
    assert (out / "STATUS").read_text() == f"interrupted@{step}\n"
    assert checkpoints(out / "checkpoints")[0].name == f"step-{step:06d}"

    ended = killer.run("resume", out, "--max-steps", step + 1)
    assert ended["code"] == 0, ended["stderr"]
    assert last_step(out) == step + 1
    assert (out / "STATUS").read_text() == "done\n"


def test_a_second_signal_leaves_at_once_with_the_last_checkpoint_intact(command, folder):
    out = folder / "twice"
    data = tiny.records(folder / "many.jsonl", 60)  # so that a step takes long
    process = started(
        command, out, "--save-steps", "1", "--accumulation", "60", "--batch-size", "1", "--data.path", str(data)
    )
    try:
        wait_for(lambda: (out / "checkpoints" / "step-000001").exists())
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    finally:
        process.kill()
        process.wait()
    [saved] = checkpoints(out / "checkpoints")
    assert problem(saved) is None
    assert (out / "STATUS").read_text() == "interrupted@1\n"


# Full disks


def test_a_file_that_may_not_grow_stops_the_run_with_its_last_checkpoint_good(command, folder, killer, whole):
    expected, _ = whole("adamw")
    out = folder / "full"
    size = max(p.stat().st_size for p in expected.rglob("*.safetensors"))
    failed = killer.run(*command(out), limit=size - 1)
    assert failed["code"] == 7, failed["stderr"]
    assert "the checkpoint of step 1 could not be written: " in failed["stderr"]
    assert "There is no checkpoint yet; make room, then start again: qlora resume" in failed["stderr"]
    assert len(failed["stderr"].splitlines()) == 1
    assert not list((out / "checkpoints").iterdir())
    assert (out / "STATUS").read_text().startswith("failed: the checkpoint of step 1 could not be written")
    finish(killer, command(out), out)
    assert_same(out, expected)


def test_a_disk_that_is_full_from_any_operation_on_ends_in_one_message(command, folder, killer, whole):
    expected, _ = whole("adamw")
    changes = 0
    while True:
        out = folder / "full"
        shutil.rmtree(out, ignore_errors=True)
        changes += 37
        failed = killer.run(*command(out), within=str(out), fail=changes)
        if failed["code"] == 0:
            break
        if (out / "checkpoints").is_dir():
            assert failed["code"] == 7, failed["stderr"]
            assert len(failed["stderr"].splitlines()) == 1
            assert "make room, then" in failed["stderr"]
        finish(killer, command(out), out)
        assert_same(out, expected)
    assert changes > 200


# What may differ, and what may not


@pytest.fixture
def stopped(folder, killer, command, tmp_path):
    """A run that was killed after its third step, with model and data of its own."""
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copy(folder / "colours.jsonl", tmp_path / "colours.jsonl")
    out = tmp_path / "run"
    flags = [str(tmp_path / Path(a).name) if a.startswith(str(folder)) and a != str(out) else a for a in command(out)]
    assert killer.run(*flags)["code"] == 0
    shutil.rmtree(out / "checkpoints" / "step-000005")
    return out


def test_a_run_that_is_done_says_so_and_makes_more_steps_if_told(killer, command, folder, whole):
    out = folder / "more"
    assert killer.run(*command(out))["code"] == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    told = killer.run("resume", out)
    assert told["code"] == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before
    assert killer.run("resume", out, "--max-steps", 3)["code"] == 2
    assert (out / "STATUS").read_text() == "done\n"
    longer = folder / "longer"
    assert killer.run("resume", out, "--max-steps", STEPS + 2)["code"] == 0
    assert killer.run(*command(longer), "--max-steps", STEPS + 2)["code"] == 0
    train = [
        [line for line in (d / "metrics.jsonl").read_text().splitlines() if '"train"' in line] for d in (out, longer)
    ]
    assert train[0] == train[1]
    assert f"max_steps = {STEPS + 2}\n" in (out / "config.toml").read_text()


def test_another_length_of_a_cosine_is_told(killer, command, folder):
    out = folder / "cosine"
    assert killer.run(*command(out), "--optimizer.schedule", "cosine")["code"] == 0
    told = killer.run("resume", out, "--epochs", 3)
    assert told["code"] == 0
    assert "the run is 6 steps long now and was 5, and its learning rate depends on that" in told["stderr"]
    assert "epochs = 3.0\n" in (out / "config.toml").read_text()
    assert "max_steps" not in (out / "config.toml").read_text()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (
            lambda run: edit(run / "config.toml", "rank = 2", "rank = 4"),
            "config.toml is not that of step-000004: lora.rank was 2 and is 4. Put it back",
        ),
        (
            lambda run: edit(run.parent / "colours.jsonl", "red", "read"),
            "is not what the run began with: colours.jsonl was",
        ),
        (
            lambda run: edit(run.parent / "model" / "config.json", "{", "{ "),
            "is not the one that the run began with: config.json was",
        ),
        (lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl has 0 bytes and had"),
        (lambda run: [p.unlink() for p in run.rglob("MANIFEST.json")], "none of its 1 checkpoints is whole"),
    ],
)
def test_what_is_not_as_it_was_is_refused_by_name(stopped, killer, harm, says):
    harm(stopped)
    refused = killer.run("resume", stopped)
    assert refused["code"] in (2, 4), refused["stderr"]
    assert says in refused["stderr"]
    assert "Traceback" not in refused["stderr"]


def edit(path, old, new):
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))


def test_a_torn_checkpoint_is_told_of_and_the_run_ends_as_it_should(killer, command, folder, whole):
    expected, _ = whole("adamw")
    out = folder / "torn"
    assert killer.run(*command(out))["code"] == 0
    (out / "checkpoints" / "step-000005" / "optimizer.safetensors").unlink()
    ended = finish(killer, command(out), out)
    assert ended["code"] == 0
    assert "step-000005 is not used: it lacks optimizer.safetensors" in (out / "log.txt").read_text()
    assert_same(out, expected)


def test_a_run_that_was_moved_goes_on(stopped, killer, whole, tmp_path):
    stopped.rename(tmp_path / "elsewhere")
    assert killer.run("resume", tmp_path / "elsewhere", "--quiet")["code"] == 0
    expected, _ = whole("adamw")
    assert (tmp_path / "elsewhere" / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()


def test_a_directory_that_is_no_run_is_refused(killer, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        refused = killer.run("resume", path)
        assert refused["code"] == 2
        assert "holds no run: it has no config.toml" in refused["stderr"]


# Parts


def test_a_lock_keeps_others_out_until_it_is_let_go(tmp_path):
    held = lock(tmp_path / ".lock")
    with pytest.raises(Held, match="is held by another process"):
        lock(tmp_path / ".lock")
    (tmp_path / "config.toml").touch()
    with pytest.raises(ConfigError, match="is being written by a process that is still running"):
        Run.reopen(tmp_path)
    unlock(held)
    unlock(lock(tmp_path / ".lock"))


def test_a_fingerprint_sees_names_sizes_and_both_ends_of_weights(tmp_path):
    large = bytes(3 * 2**20)
    (tmp_path / "model.safetensors").write_bytes(large)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("read me")
    before = fingerprint(tmp_path)
    assert list(before) == ["config.json", "model.safetensors"]
    for harmed in (b"x" + large[1:], large[:-1] + b"x", large + b"\0"):
        (tmp_path / "model.safetensors").write_bytes(harmed)
        assert fingerprint(tmp_path)["model.safetensors"] != before["model.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(large)
    (tmp_path / "README.md").write_text("read on")
    assert fingerprint(tmp_path) == before
    assert fingerprint(tmp_path / "model.safetensors") == {"model.safetensors": before["model.safetensors"]}
