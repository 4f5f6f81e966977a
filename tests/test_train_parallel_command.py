"""Training on several processes from the command line: started, killed, asked to stop, gone on with."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qlora
from tests import tiny
from train.checkpoint import checkpoints

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
SETTINGS = (
    "--batch-size 2 --accumulation 3 --lora.rank 2 --lora.dropout 0 --dtype float32 --device cpu --data.eval-size 0 "
    "--quiet"
)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The arguments of a training into a directory."""
    folder = tmp_path_factory.mktemp("command")
    model, data = tiny.checkpoint(folder / "model"), tiny.records(folder / "colours.jsonl", 9)

    def make(out, *more):
        return ["train", "--model", str(model), "--data.path", str(data), "--out", str(out), *SETTINGS.split(), *more]

    return make


def started(*arguments, module="qlora"):
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(run, step, process):
    for _ in range(1200):
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the step was never made")


def test_torchrun_trains_as_one_process_does(command, tmp_path):
    arguments = command(tmp_path / "two", "--max-steps", "3", "--distributed", "fsdp", "--json")
    process = started("--nproc-per-node", "2", "-m", "qlora", *arguments, module="torch.distributed.run")
    out, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert json.loads(out)["status"] == "done", "one JSON object, of the main process"
    assert qlora.main(command(tmp_path / "one", "--max-steps", "3")) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert (tmp_path / "two" / "STATUS").read_text() == "done\n"


def test_a_killed_process_ends_the_run_and_a_signal_saves_it(command, tmp_path):
    """One run: killed after some steps, gone on with until a signal comes, and ended by one process."""
    run = tmp_path / "run"
    process = started(*command(run, "--nproc", "2", "--max-steps", "100000", "--save-steps", "2"))
    wait_for_step(run, 4, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    last = next(
        int(child) for child in children if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    )
    os.kill(last, signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode not in (0, None)
    assert said.count("process 1") == 1, said
    assert re.match(r"failed: process 1 .*\n", (run / "STATUS").read_text())

    made = len(losses(run))
    process = started("resume", run, "--nproc", "2", "--distributed", "fsdp", "--quiet")
    wait_for_step(run, made + 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    stopped = len(losses(run))
    assert (run / "STATUS").read_text() == f"interrupted@{stopped}\n"
    assert checkpoints(run / "checkpoints")[0].name == f"step-{stopped:06d}"
    assert qlora.main(["resume", str(run), "--max-steps", str(stopped + 1), "--quiet"]) == 0
    assert len(losses(run)) == stopped + 1
