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
from tests import tiny
from tests.killing import Killer
from train.checkpoint import checkpoints
from train.lock import lock, unlock
from train.optimizer import NAMES

STEPS = 5
SAME = ("metrics.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "data/manifest.json")
# Dropout, accumulation that does not divide an epoch, three epochs in another order each, evaluations between.
SETTINGS = (
    f"--max-steps {STEPS} --batch-size 2 --accumulation 2 --eval-steps 2 --save-steps 1 --keep-checkpoints 2 "
    "--lora.rank 2 --lora.dropout 0.2 --data.eval-size 2 --dtype float32 --device cpu --quiet"
)
STRIDE = 13  # operations between two kills of one optimizer's runs; each optimizer starts elsewhere


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
    for at in range(first, len(operations) + 1, STRIDE * 4):
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
