"""Processes that are killed: forked from one that has imported everything, so that a run takes a fraction of a second.

`python -m tests.killing` reads one JSON object a line, forks a child that runs a command, kills it as asked, and
answers how it ended. Two ways to kill: after some seconds, wherever the child then is; or at the n-th of its operations
on files, counted by Python's audit hooks (open, rename, remove, mkdir, ...) and by fsync, so that every n can be tried.
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.listdir", "os.scandir"}


class Killer:
    """The forking process, seen from a test."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "tests.killing"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)

    def run(self, *arguments: object, **how: Any) -> dict[str, Any]:
        """Run a command line to its end or to its death.

        after: seconds until it is killed. at: the operation on files that it does not live to make; only those on
        paths below `within` count. limit: bytes that a file may have. fail: the first of those that need
        room which finds none, as all that follow do.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"argv": [str(a) for a in arguments], **how}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def serve() -> None:
    import torch

    import qlora
    import train.loop
    from tests import tiny

    torch.set_num_threads(1)  # threads do not survive a fork
    train.loop.plot_runs = lambda runs, target: []  # a second for each run, and pictures have tests of their own
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        model, data = tiny.checkpoint(Path(folder) / "model"), tiny.records(Path(folder) / "data.jsonl", 4)
        warm_up = f"train --model {model} --data.path {data} --max-steps 1 --data.eval-size 1 --quiet"
        assert qlora.main([*warm_up.split(), "--out", f"{folder}/run"]) == 0
        assert qlora.main(["resume", f"{folder}/run"]) == 0
    for line in sys.stdin:
        print(json.dumps(one(json.loads(line))), flush=True)


def one(order: dict[str, Any]) -> dict[str, Any]:
    """Fork a child, and wait for its end."""
    said, counted = os.memfd_create("stderr"), os.memfd_create("counted")
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(said, 2)
        os._exit(act(order, counted))
    while "after" in order and time.monotonic() < started + order["after"]:
        time.sleep(0.001)
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
    if "after" in order:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    answer = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - started}
    answer |= {"stderr": os.pread(said, 2**20, 0).decode(), "operations": os.pread(counted, 2**20, 0).decode().split()}
    os.close(said)
    os.close(counted)
    return answer


def act(order: dict[str, Any], counted: int) -> int:
    """What the child does."""
    import qlora

    if "limit" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    if "within" in order:
        count_operations(order, counted)
    try:
        return qlora.main(order["argv"])
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 99
    finally:
        sys.stderr.flush()


def count_operations(order: dict[str, Any], counted: int) -> None:
    """From now on count operations on files, and die or fail at the one that was asked for."""
    seen = 0

    def meet(what: str) -> None:
        nonlocal seen
        seen += 1
        os.write(counted, f"{what}\n".encode())
        if seen == order.get("at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if seen >= order.get("fail", seen + 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and arguments and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[0])
            fills = event in ("os.mkdir", "os.rename") or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
            if path.startswith(order["within"]) and ("fail" not in order or fills):
                meet(f"{event}:{path.removeprefix(order['within'])}")

    fsync = os.fsync

    def synced(descriptor: Any) -> None:
        meet("fsync")
        fsync(descriptor)

    sys.addaudithook(hook)
    setattr(os, "fsync", synced)  # noqa: B010


if __name__ == "__main__":
    serve()
