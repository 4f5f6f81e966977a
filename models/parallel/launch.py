"""A command on several processes of this machine (`--nproc N`), and what of a command several processes may do.

The launcher parses the command, keeps the store in which the processes meet, and starts the same command N times with
torchrun's environment, so that there is no difference to `torchrun --nproc-per-node N`. Signals go on to the processes,
which have a session of their own: a Ctrl-C of the terminal then reaches them once. It waits as long as they want to
save. When one of them fails it gives the others some seconds to end by themselves; the exit code is that of the first.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from types import FrameType

import torch.distributed as dist

from models.device import pick_device
from models.errors import ConfigError, PeerError
from models.parallel import watch, world
from models.parallel.board import Board, Failure, launched, launched_as

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ALONE = 10.0
"""Seconds that processes have to end by themselves when one has failed; a watch needs up to 8."""
STUBBORN = 5.0
"""Seconds after SIGTERM until SIGKILL."""
POLL = 0.05
YEAR = 365 * 86400.0


@dataclass(frozen=True)
class Processes:
    """What the options of a command say about processes. Options that lack it are for one process alone."""

    count: int
    """--nproc."""
    device: str
    """As the user names it; auto is a GPU if there is one."""
    timeout: float = watch.TIMEOUT
    """Seconds that a process waits for the others."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"nproc is {self.count}; it must be at least 1")
        if not 0 < self.timeout <= YEAR:
            raise ConfigError(f"timeout is {self.timeout:g}; it must be above 0 and at most {YEAR:g} seconds")


def to_start(asked: Processes | None) -> int:
    """How many processes the command has to be started in from here; 1 if it runs in this one."""
    count = 1 if asked is None else asked.count
    if "WORLD_SIZE" in os.environ:
        if count not in (1, launched()):
            raise ConfigError(
                f"nproc is {count}, but a launcher has started this process as one of {launched()} (WORLD_SIZE); "
                "leave --nproc out, or leave torchrun out"
            )
        return 1
    if asked is not None and count > 1:
        world.own(pick_device(asked.device), count)
    return count


@contextmanager
def joined(name: str, asked: Processes | None, harmless: bool = False) -> Iterator[None]:
    """Run a command as one of the processes that a launcher has started, or alone.

    What only one process can do is refused, unless it is harmless. Only the main process has a standard output.
    """
    if launched() == 1:
        yield
    elif asked is not None:
        with world.world(pick_device(asked.device), asked.timeout), quiet(errors=False):
            yield
    elif harmless:
        with quiet(errors=False):
            yield
    else:
        raise ConfigError(
            f"{name} works in one process, but a launcher has started {launched()} (WORLD_SIZE); leave torchrun out"
        )


def speaks() -> bool:
    """Is this the process that prints, if there are several?"""
    return launched_as() == 0


@contextmanager
def quiet(errors: bool = True) -> Iterator[None]:
    """In all processes but the main one: print nothing on stdout, and on stderr neither if `errors`."""
    if speaks():
        yield
        return
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null if errors else sys.stderr):
        yield


def launch(command: Sequence[str], count: int) -> int:
    """Run a command in so many processes; give the exit code of the one that failed first, or 0.

    A PeerError if one failed and none of them could say so.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    board = Board(dist.PrefixStore("attempt 0", store), count)
    ranks: list[subprocess.Popen] = []
    with passed_on(ranks) as signals:
        for rank in range(count):
            ranks.append(
                subprocess.Popen(
                    command,
                    env=os.environ | environment(rank, count, store.port),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        codes = wait(ranks, board)
    failure = board.failure()
    if failure is None:
        return next((code for code in codes if code), 0)
    code = codes[failure.rank] or next((code for code in codes if code), PeerError.exit_code)
    if not board.is_told() and code - 128 not in signals:  # whoever has sent a signal need not be told of it
        error = PeerError(failure.text)
        error.exit_code = code
        raise error
    return code


def environment(rank: int, count: int, port: int) -> Mapping[str, str]:
    """What torchrun tells a process: who it is, and where the store is, which the launcher keeps."""
    defaults = {
        "OMP_NUM_THREADS": "1",  # as torchrun has it
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # its warnings show, with stacks of C++, what is told in a sentence
    }
    return {name: value for name, value in defaults.items() if name not in os.environ} | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def wait(ranks: Sequence[subprocess.Popen], board: Board) -> list[int]:
    """Wait until all processes have ended, and see to it that they do once one has failed; give their exit codes."""
    failed_at: float | None = None
    sent: set[signal.Signals] = set()
    while any(process.poll() is None for process in ranks):
        time.sleep(POLL)
        for rank, process in enumerate(ranks):
            if process.poll() and failed_at is None and (board.failure() or board.read("left", rank) is None):
                board.fail(Failure(rank, f"process {rank} {ended(process.returncode)}"))  # unless it has said so itself
                failed_at = time.monotonic()
        failed_for = 0.0 if failed_at is None else time.monotonic() - failed_at
        for number, after in ((signal.SIGTERM, ALONE), (signal.SIGKILL, ALONE + STUBBORN)):
            if failed_for > after and number not in sent:
                sent.add(number)
                send(number, ranks)
    return [as_shells_say(process.returncode) for process in ranks]


def ended(code: int) -> str:
    """How a process that said nothing has ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    killed = f"was killed by {signal.Signals(-code).name}"
    return f"{killed}, as when memory runs out" if -code == signal.SIGKILL else killed


def as_shells_say(code: int) -> int:
    """The exit code; 128 + signal for one that was killed."""
    return 128 - code if code < 0 else code


@contextmanager
def passed_on(ranks: Sequence[subprocess.Popen]) -> Iterator[set[int]]:
    """While entered, signals that ask this process to end go to those it has started; gives which have come."""
    seen: set[int] = set()

    def handle(number: int, frame: FrameType | None) -> None:
        seen.add(number)
        send(number, ranks)

    if threading.current_thread() is not threading.main_thread():  # Python gives signals to no other
        yield seen
        return
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def send(number: int, ranks: Sequence[subprocess.Popen]) -> None:
    for process in ranks:
        process.send_signal(number)  # nothing, if it has ended
