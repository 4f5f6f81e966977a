"""Jobs of several processes that go wrong as they are told, forked from one process that has imported everything.

`python -m tests.failing` reads one JSON object a line: what each process of a job does, by the names below. It starts
them as a launcher that does nothing for them but to keep their store, and answers how each ended and what it said.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TIMEOUT = 2.0
"""Seconds that a process waits for the others."""
LONG = 20.0
"""Seconds after which a process is killed that should have ended."""


class Jobs:
    """The forking process, seen from a test."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command, pipe = [sys.executable, "-m", "tests.failing"], subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)

    def run(self, *does: str, launcher: str = "there") -> dict[str, Any]:
        """Run a job, and give `codes` and what was `said` by rank, and `seconds`.

        A process does something before it joins the others where that begins with "before: ". The launcher, which
        keeps the store, is "there"; or "dies" soon; or "kills" the others as soon as one has ended; or "lacks", and
        then the main process keeps it.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"does": does, "launcher": launcher}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


# What a process does


def sums() -> None:
    from models.parallel import world

    with world.doing("the sums of step 5"):
        world.sums(1.0)


def barrier() -> None:
    from models.parallel import world

    world.barrier()


def from_main() -> None:
    from models.parallel import world

    world.from_main("x")


def from_all() -> None:
    from models.parallel import world

    world.from_all("x")


def recv() -> None:
    import torch
    import torch.distributed as dist

    dist.recv(torch.ones(4), src=1)


def ddp(pause: Callable[[], None] = lambda: None) -> None:
    """The backward pass sums gradients."""
    import torch

    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    loss = model(torch.ones(2, 4)).sum()
    pause()
    loss.backward()


def fsdp(before_forward: Callable[[], None] = lambda: None, in_backward: Callable[[], None] = lambda: None) -> None:
    """The forward pass gathers weights, the backward pass scatters gradients."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    before_forward()
    y = model(torch.ones(2, 4))
    y.register_hook(lambda gradient: in_backward())
    y.sum().backward()


def hang() -> None:
    from models.parallel import world

    with world.doing("a long sleep"):
        time.sleep(60)


def stuck() -> None:
    """As in a GPU's collective: it does not come back when another process is gone."""
    from models.parallel import world

    def fails(error: BaseException) -> None:
        raise ZeroDivisionError("in a hook")

    def speaks(error: BaseException) -> None:
        print(f"last words: {error}", file=sys.stderr)

    with world.last_words(speaks), world.last_words(fails):  # the last one comes first
        time.sleep(60)


def until_asked() -> None:
    """What a run does until it is asked to stop."""
    from train.interrupt import Interrupt

    with Interrupt() as interrupt:
        while interrupt.signal is None:
            time.sleep(0.05)
    raise SystemExit(128 + interrupt.signal)


def saves_and_stops() -> None:
    """What a run does that was asked to stop."""
    time.sleep(0.5)
    raise SystemExit(143)


def raises(error: BaseException, after: float = 0.0) -> Callable[[], None]:
    def action() -> None:
        time.sleep(after)
        raise error

    return action


def actions() -> dict[str, Callable[[], None]]:
    from models.errors import DataError

    return {
        "nothing": lambda: None,
        "rest": lambda: time.sleep(0.7),
        "sums": sums,
        "barrier": barrier,
        "from main": from_main,
        "from all": from_all,
        "recv": recv,
        "ddp": ddp,
        "ddp, hang": lambda: ddp(hang),
        "fsdp": fsdp,
        "fsdp, hang before forward": lambda: fsdp(hang),
        "fsdp, hang in backward": lambda: fsdp(in_backward=hang),
        "hang": hang,
        "stuck": stuck,
        "until asked": until_asked,
        "saves and stops": saves_and_stops,
        "stops": raises(SystemExit(143)),
        "error": raises(ZeroDivisionError("by hand")),
        "own runtime error": raises(RuntimeError("a shape is wrong")),
        "refusal": raises(DataError("line 3 is bad")),
        "late refusal": raises(DataError("line 3 is bad"), after=0.3),
        "exit": raises(SystemExit(3)),
        "os exit": lambda: os._exit(7),
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    }


def act(what: str) -> int:
    """The life of one process, with an end like that of a verb of the command line."""
    import torch

    from models.errors import Refusal
    from models.parallel import watch, world
    from models.parallel.failure import end_if_broken, watched

    torch.set_num_threads(1)
    watch.BEAT, watch.SAME, watch.PATIENCE, watch.GRACE = 0.1, 0.7, 1.0, 2.0
    early = what.startswith("before: ")
    action = actions()[what.removeprefix("before: ")]
    try:
        with watched(lambda error: print(f"told: {error}", file=sys.stderr, flush=True)):
            if early:
                action()
            with world.world("cpu", TIMEOUT):
                if not early:
                    action()
    except BaseException as error:
        code = error.exit_code if isinstance(error, Refusal) else None
        end_if_broken(error, code)
        if isinstance(error, SystemExit):
            return int(error.code or 0)
        if code is None:
            traceback.print_exc()
        return 1 if code is None else code
    return 0


def serve() -> None:

    from models.parallel import world

    assert world.launched() == 1
    for line in sys.stdin:
        print(json.dumps(job(**json.loads(line))), flush=True)


def job(does: list[str], launcher: str) -> dict[str, Any]:
    """Fork a process for each thing to do, and wait for their ends; those that take long are killed."""
    import torch.distributed as dist

    from models.parallel.launch import environment

    store = None if launcher == "lacks" else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = free_port() if store is None else store.port
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(len(does))]
        children = []
        for rank, what in enumerate(does):
            child = os.fork()
            if child == 0:
                os.environ |= environment(rank, len(does), port)
                os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": str(store is not None)}
                os.dup2(os.open(os.devnull, os.O_RDWR), 0)
                os.dup2(os.open(said[rank], os.O_WRONLY | os.O_CREAT), 1)
                os.dup2(1, 2)
                os._exit(act(what))
            children.append(child)
        codes: dict[int, int] = {}
        while len(codes) < len(children) and time.monotonic() < began + LONG:
            for child in set(children) - codes.keys():
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
            if launcher == "kills" and codes:
                for child in set(children) - codes.keys():
                    os.kill(child, signal.SIGKILL)
            if launcher == "dies" and time.monotonic() > began + 0.7:
                store = None
            time.sleep(0.02)
        seconds = time.monotonic() - began
        for child in set(children) - codes.keys():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        texts = [path.read_text() for path in said]
    return {"codes": [codes.get(child) for child in children], "said": texts, "seconds": seconds}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    serve()
