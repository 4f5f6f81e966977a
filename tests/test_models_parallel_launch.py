"""`--nproc N` and torchrun: the same command in several processes, their signals, their ends and their exit codes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import qlora
from models.errors import ConfigError, PeerError
from models.parallel import launch
from models.parallel.launch import Processes
from tests import tiny
from tests.failing import free_port

ROOT = Path(qlora.__file__).parent


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Of the launcher, less than a person would want."""
    monkeypatch.setattr(launch, "ALONE", 0.5)
    monkeypatch.setattr(launch, "STUBBORN", 0.5)


def script(tmp_path, *lines):
    """A command for processes without torch, which start in no time; RANK is theirs."""
    path = tmp_path / "script.py"
    begin = "import os, signal, sys, time; RANK = int(os.environ['RANK']); HERE = os.path.dirname(__file__)"
    path.write_text("\n".join([begin, *lines]))
    return [sys.executable, str(path)]


@pytest.fixture
def typed():
    """Something on standard input, which is for whoever reads it on purpose."""
    reading, writing = os.pipe()
    os.write(writing, b"typed")
    os.close(writing)
    before = os.dup(0)
    os.dup2(reading, 0)
    yield
    os.dup2(before, 0)
    os.close(before)
    os.close(reading)


@pytest.mark.usefixtures("typed")
def test_processes_know_who_they_are_and_speak_for_themselves(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    command = script(
        tmp_path,
        "names = 'LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS'.split()",
        "said = [os.environ[name] for name in names] + [os.getsid(0) == os.getpid(), sys.stdin.read()]",
        "print(RANK, *said, sep=',', flush=True)",
        "print('error', RANK, file=sys.stderr)",
    )
    assert launch.launch(command, 3) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == [f"{rank},{rank},3,3,127.0.0.1,1,True," for rank in range(3)]
    assert sorted(err.splitlines()) == ["error 0", "error 1", "error 2"]


@pytest.mark.parametrize(
    ("end", "code", "text"),
    [
        ("sys.exit(5)", 5, "process 1 ended with exit code 5"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "process 1 was killed by SIGKILL, as when memory runs out"),
        ("os.abort()", 134, "process 1 was killed by SIGABRT"),
    ],
)
def test_when_one_ends_early_the_others_are_ended_and_its_code_counts(tmp_path, end, code, text):
    began = time.monotonic()
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" if code == 137 else ""
    command = script(tmp_path, f"if RANK == 1: time.sleep(0.3); {end}", stubborn, "time.sleep(60)")
    with pytest.raises(PeerError) as caught:
        launch.launch(command, 2)
    assert str(caught.value) == text
    assert caught.value.exit_code == code
    assert time.monotonic() - began < 10


def wait_for(*paths):
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.02)


def send_when_ready(folder, ranks, *numbers):
    """Send signals to this process, as soon as all ranks have left a file, and each has been seen by all."""

    def send():
        wait_for(*(folder / f"ready-{rank}" for rank in range(ranks)))
        for count, number in enumerate(numbers, 1):
            os.kill(os.getpid(), number)
            wait_for(*(folder / f"seen-{rank}-{count}" for rank in range(ranks)))

    thread = threading.Thread(target=send)
    thread.start()
    return thread


SAVES = (  # at the first signal it begins to save; `seen` says how many have come
    "seen = []",
    "def handle(number, frame): seen.append(number); open(f'{HERE}/seen-{RANK}-{len(seen)}', 'w').close()",
    "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, handle)",
    "open(f'{HERE}/ready-{RANK}', 'w').close()",
    "while not seen: time.sleep(0.02)",
)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_each_process_once_and_all_may_save(tmp_path, number, code):
    command = script(tmp_path, *SAVES, "time.sleep(1.5)", "print(RANK)", f"sys.exit({code} if len(seen) == 1 else 1)")
    before = signal.getsignal(number)
    sender = send_when_ready(tmp_path, 2, number)
    assert launch.launch(command, 2) == code
    sender.join()
    assert signal.getsignal(number) is before


def test_a_second_signal_is_passed_on_as_well(tmp_path):
    command = script(tmp_path, *SAVES, "while len(seen) < 2: time.sleep(0.02)", "sys.exit(128 + seen[1])")
    sender = send_when_ready(tmp_path, 2, signal.SIGTERM, signal.SIGINT)
    assert launch.launch(command, 2) == 130
    sender.join()


def test_a_command_that_does_not_save_ends_by_the_signal(tmp_path):
    command = script(tmp_path, "open(f'{HERE}/ready-{RANK}', 'w').close()", "time.sleep(60)")
    sender = threading.Thread(
        target=lambda: (wait_for(tmp_path / "ready-0", tmp_path / "ready-1"), os.kill(os.getpid(), signal.SIGTERM))
    )
    sender.start()
    assert launch.launch(command, 2) == 143
    sender.join()


# What is asked for


def test_a_command_is_started_in_as_many_processes_as_asked():
    assert launch.to_start(None) == 1
    assert launch.to_start(Processes(1, "cpu")) == 1
    assert launch.to_start(Processes(3, "cpu")) == 3


@pytest.mark.parametrize(("count", "timeout"), [(0, 1), (-1, 1), (1, 0), (1, float("inf")), (1, float("nan"))])
def test_impossible_numbers_are_refused(count, timeout):
    with pytest.raises(ConfigError, match="it must be"):
        Processes(count, "cpu", timeout)


def test_processes_on_gpus_need_one_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch.to_start(Processes(2, "auto")) == 2
    with pytest.raises(ConfigError, match="3 processes need a GPU each, and this machine has 2"):
        launch.to_start(Processes(3, "cuda"))
    with pytest.raises(ConfigError, match="cuda:1 is one GPU, but 2 processes need one each"):
        launch.to_start(Processes(2, "cuda:1"))
    with pytest.raises(ConfigError, match="on cpu or cuda, not on meta"):
        launch.to_start(Processes(2, "meta"))


def test_a_launcher_within_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.to_start(Processes(2, "cpu")) == 1
    assert launch.to_start(Processes(1, "cpu")) == 1
    with pytest.raises(ConfigError, match=r"nproc is 3, but a launcher has started this process as one of 2"):
        launch.to_start(Processes(3, "cpu"))


def test_only_the_main_process_prints_and_only_what_works_together_is_done(monkeypatch, capsys):
    for rank, expected in ((0, "result\n"), (1, "")):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        with launch.joined("list", None, harmless=True):
            print("result")
            print("what only I know", file=sys.stderr)
        assert capsys.readouterr() == (expected, "what only I know\n")
        with launch.quiet():
            print("result")
            print("usage", file=sys.stderr)
        assert capsys.readouterr() == (expected, "usage\n" if rank == 0 else "")
        with pytest.raises(ConfigError, match="merge works in one process, but a launcher has started 2"):
            launch.joined("merge", None).__enter__()


def test_an_environment_that_no_launcher_sets_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert qlora.main(["list", "tasks"]) == 2
    assert "WORLD_SIZE=2 but not LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert qlora.main(["list", "tasks"]) == 2
    assert "WORLD_SIZE=two, which is not a number" in capsys.readouterr().err


# The command line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def test_a_verb_in_two_processes_prints_one_result(model, capfd):
    arguments = ["generate", str(model), "--prompt", "It is", "--max-new-tokens", "4", "--load.dtype", "float32"]
    assert qlora.main([*arguments, "--json"]) == 0
    alone = json.loads(capfd.readouterr().out)
    assert qlora.main([*arguments, "--json", "--nproc", "2"]) == 0
    assert json.loads(capfd.readouterr().out) == alone


def test_what_is_wrong_is_said_before_processes_start(model, capfd, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert qlora.main(["eval", str(model), "--nproc", "0"]) == 2
    assert qlora.main(["eval", str(model), "--nproc", "2", "--limit", "-1"]) == 2
    assert qlora.main(["resume", str(model), "--nproc", "2"]) == 2
    assert "holds no run" in capfd.readouterr().err


def test_torchrun_on_two_machines_tells_a_refusal_once(model, tmp_path):
    """Two launchers on one host stand for them; both ranks run into the same mistake."""
    port, torchrun = free_port(), [sys.executable, "-m", "torch.distributed.run"]
    command = ["-m", "qlora", "eval", str(model), "--data", str(tmp_path / "nothing")]
    where = f"--nnodes 2 --nproc-per-node 1 --master-addr 127.0.0.1 --master-port {port}"
    launchers = [
        subprocess.Popen(
            [*torchrun, *where.split(), "--node-rank", str(node), *command],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    said = [launcher.communicate(timeout=120)[1] for launcher in launchers]
    lines = [line for text in said for line in text.splitlines() if line.startswith("qlora eval:")]
    assert lines == [f"qlora eval: data: {tmp_path / 'nothing'} does not exist"]
    assert "exitcode  : 3" in said[0]
    assert all(launcher.returncode for launcher in launchers)
