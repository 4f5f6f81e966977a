"""The board on which the processes of one job leave notes for each other: small texts in the launcher's store.

It works while a collective hangs and after a process has died, for it needs neither torch's process group nor the
others' help. Nothing here waits: a note is there or it is not.

    here RANK     where the process runs, and its id there
    begins RANK   it is about to join the others
    doing RANK    what it does
    waits RANK    in which collective it has given up waiting
    late RANK     because nobody answered in time
    left RANK     it has come to its end in good order
    failed        why the job ends; the first one who knows writes it
    told          who has told the person of that
"""

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from models.errors import ConfigError

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher has to say in the environment."""
CONNECT = 60.0
"""Seconds in which the store has to answer for the first time; it is there before the processes are."""


@dataclass(frozen=True)
class Failure:
    """Why a job ends."""

    rank: int
    """The process that failed, or that found out about what is wrong."""
    text: str
    """A sentence for the person."""
    missing: tuple[int, ...] = ()
    """The processes that did not come, where others have waited in vain."""


def launched() -> int:
    """How many processes the launcher that started this one said there are; 1 without a launcher."""
    return number("WORLD_SIZE", 1)


def launched_as() -> int:
    """Which of them this one is."""
    return number("RANK", 0) if launched() > 1 else 0


def number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment says {name}={text}, which is not a number; a launcher sets it") from None


def reach(server: bool = False) -> dist.Store:
    """A connection to the store. The launcher keeps it, or else the process with rank 0, which has to ask for that."""
    lacking = [name for name in LAUNCHER if name not in os.environ]
    if lacking:
        raise ConfigError(
            f"the environment says WORLD_SIZE={launched()} but not {', '.join(lacking)}; "
            "start the processes by torchrun or by --nproc"
        )
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        number("MASTER_PORT", 0),
        is_master=server and not kept_by_launcher(),
        wait_for_workers=False,
        timeout=timedelta(seconds=CONNECT),
    )
    return dist.PrefixStore(f"attempt {number('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def kept_by_launcher() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class Board:
    """The notes in a store, by name and rank."""

    def __init__(self, store: dist.Store, size: int) -> None:
        self.store = store
        self.size = size

    def note(self, name: str, rank: int, text: str = "yes") -> None:
        self.store.set(f"{name} {rank}", text)

    def read(self, name: str, rank: int) -> str | None:
        return self.text(f"{name} {rank}")

    def who(self, name: str) -> set[int]:
        """The processes that have left such a note."""
        return {rank for rank in range(self.size) if self.store.check([f"{name} {rank}"])}

    def all(self, name: str) -> dict[int, str]:
        """Those notes, by rank."""
        found = {rank: self.read(name, rank) for rank in range(self.size)}
        return {rank: text for rank, text in found.items() if text is not None}

    def fail(self, failure: Failure) -> Failure:
        """Write why the job ends, and give what counts: what was written first."""
        first = self.store.compare_set("failed", "", json.dumps(asdict(failure)))
        return failure_of(first.decode())

    def failure(self) -> Failure | None:
        text = self.text("failed")
        return None if text is None else failure_of(text)

    def tell(self, who: str) -> bool:
        """Claim to be the one who tells the person; False if another does."""
        return self.store.compare_set("told", "", who).decode() == who

    def is_told(self) -> bool:
        return self.store.check(["told"])

    def text(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None


def failure_of(text: str) -> Failure:
    found = json.loads(text)
    return Failure(found["rank"], found["text"], tuple(found["missing"]))


# Processes that can see each other


def address() -> str:
    """Where this process is: machine, namespace of process ids, id."""
    namespace = ""
    with suppress(OSError):  # only Linux has them
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace} {os.getpid()}"


def neighbours(addresses: dict[int, str]) -> dict[int, int]:
    """The ids of those processes that run where this one does."""
    here = address().rpartition(" ")[0]
    found = {rank: text.rpartition(" ") for rank, text in addresses.items()}
    return {rank: int(pid) for rank, (where, _, pid) in found.items() if where == here}


def is_gone(pid: int) -> bool:
    """Has a process ended? One that its parent has not noticed yet has as well."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1]
    except ProcessLookupError:
        return True
    except OSError:  # another user's, or a system without /proc
        return False
    return state in (b"Z", b"X")
