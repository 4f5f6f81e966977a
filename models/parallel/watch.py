"""A process's eye on the others of its job: a thread that looks at the board twice a second.

It knows of a failure by the note of the one who failed, or because a process on the same machine is gone without a
word. What happens then depends on the main thread:

- Waiting for a collective over the CPU it gets an error as soon as the other process is gone. `explained` makes of it
  a PeerError with the reason, which goes its way up like any other.
- Within a GPU's collective, or hung, it gets none. After some seconds the thread does what has to be done in its
  place (the hooks), and ends the process.

The person is told once, by the main process. Others whose error is their own wait until it has done so, for a launcher
may end it as soon as they are gone. If it does not, since it is dead or stuck itself, they tell it.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Set

import torch.distributed as dist

from models.errors import PeerError, Refusal
from models.parallel import board
from models.parallel.board import Board, Failure
from models.parallel.collectives import collective, is_late, is_of_collective, said

Tell = Callable[[BaseException], None]

TIMEOUT = 600.0
"""Seconds that a process waits for the others, unless it is told."""
BEAT = 0.5
"""Seconds between two looks at the board."""
SAME = 1.5
"""Seconds that the main process has to run into the same error as another, and to tell it as its own."""
PATIENCE = 3.0
"""Seconds that a process which has lost another waits for the reason, or for others to say that they wait as well."""
GRACE = 8.0
"""Seconds that the main thread has to end a job that has failed, before the process is ended."""
POLL = 0.05


class Watch:
    """The thread, and what the main thread asks and says."""

    def __init__(self, tell: Tell | None = None) -> None:
        self.rank, self.size = board.launched_as(), board.launched()
        self.board = Board(board.reach(server=self.rank == 0), self.size)
        self.tell = tell
        self.timeout = TIMEOUT
        self.doing = ""
        """What this process does, in words."""
        self.shown = ""
        """The same, as it stands on the board."""
        self.failure: Failure | None = None
        """Why the job ends, as soon as that is known here."""
        self.known_since = 0.0
        self.neighbours: dict[int, int] = {}
        """The ids of the processes on this machine."""
        self.all_known = False
        self.hooks: list[Tell] = []
        """Called with the error that the main thread cannot raise, before the process is ended in its place."""
        self.telling = threading.Lock()
        self.has_told = False
        self.leaving = False
        """Does the main thread know that this process ends?"""
        self.has_left = False
        self.stop = threading.Event()
        self.board.note("here", self.rank, board.address())
        self.thread = threading.Thread(target=self.look, name="watch", daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.stop.set()
        self.thread.join(PATIENCE)  # it may wait for a store that is gone

    # The thread

    def look(self) -> None:
        """Look at the board until the main thread is done with it."""
        while not self.stop.wait(BEAT):
            try:
                self.beat()
            except dist.DistError:
                self.lose()
                return

    def beat(self) -> None:
        if self.doing != self.shown:
            self.shown = self.doing
            self.board.note("doing", self.rank, self.shown)
        failure = self.news() or self.deaths()
        if failure is None:
            return
        known = time.monotonic() - self.known_since
        if known > SAME and (self.rank == 0 or self.is_dead(0)):
            self.tell_once(PeerError(failure.text))
        if known > (SAME if self.rank in failure.missing else GRACE) and not self.leaving:
            self.end(failure)

    def deaths(self) -> Failure | None:
        """Report a process of this machine that is gone, but neither failed nor came to its end."""
        self.look_around()
        for rank in self.neighbours:
            if self.is_dead(rank) and self.board.read("left", rank) is None:
                return self.report(
                    rank, f"process {rank} is gone: it has crashed, or was killed, as when memory runs out"
                )
        return None

    def look_around(self) -> None:
        """Find out which processes run on this machine, until all are known."""
        if not self.all_known:
            here = self.board.all("here")
            self.neighbours, self.all_known = board.neighbours(here), len(here) == self.size

    def is_dead(self, rank: int) -> bool:
        return rank in self.neighbours and board.is_gone(self.neighbours[rank])

    def lose(self) -> None:
        """The board is gone. If the launcher kept it, be interrupted, so that what can be saved is saved."""
        if self.leaving:
            return
        if board.kept_by_launcher():
            if self.rank == 0:
                print("the launcher is gone, so the job is interrupted", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self.stop.wait(GRACE):
            print("process 0 is gone, and with it the store in which processes meet", file=sys.stderr)
            self.end(Failure(0, "process 0 is gone"))

    def end(self, failure: Failure) -> None:
        """End this process, since its main thread does not."""
        error = PeerError(failure.text)
        if self.rank in failure.missing:
            stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident or 0])
            print(f"process {self.rank} did not come; this is where it is:\n{''.join(stack[-8:])}", file=sys.stderr)
        for hook in reversed(self.hooks):
            try:
                hook(error)
            except Exception:  # whatever it is, the process ends, and the other hooks have their turn
                traceback.print_exc()
        end_now(error.exit_code)

    # What both threads do

    def news(self) -> Failure | None:
        """Why the job ends, if it does."""
        if self.failure is None:
            self.learn(self.board.failure())
        return self.failure

    def report(self, rank: int, text: str, missing: Set[int] = frozenset()) -> Failure:
        """Write on the board why the job ends; give what stands there first."""
        first = self.board.fail(Failure(rank, text, tuple(sorted(missing))))
        self.learn(first)
        return first

    def learn(self, failure: Failure | None) -> None:
        if failure is not None and self.failure is None:
            self.known_since = time.monotonic()
            self.failure = failure

    def tell_once(self, error: BaseException) -> None:
        """Tell the person, unless somebody has."""
        with self.telling:
            if self.board.tell(f"process {self.rank}") and not self.has_told:
                self.has_told = True
                if self.tell is not None:
                    self.tell(error)
                elif isinstance(error, PeerError):  # any other shows itself where it was raised
                    print(error, file=sys.stderr)

    # The main thread

    def gather(self) -> None:
        """Wait until all processes are about to begin."""
        self.board.note("begins", self.rank)
        self.wait_for("begins", "the start")
        self.look_around()

    def wait_for(self, note: str, what: str) -> None:
        """Wait until all processes have left such a note."""
        until = time.monotonic() + self.timeout
        while missing := set(range(self.size)) - self.board.who(note):
            if (failure := self.news()) is not None:
                raise PeerError(failure.text)
            if time.monotonic() > until:
                raise PeerError(self.report_hang(f"no answer within {self.timeout:g} s at {what}", missing).text)
            time.sleep(POLL)

    def explained(self, error: BaseException) -> PeerError | None:
        """What an error of a collective means; None for one that is this process's own."""
        if not is_of_collective(error):
            return None
        where = f"{collective(error)} ({self.doing})" if self.doing else collective(error)
        try:
            failure = self.news() or self.reason(error, where)
        except dist.DistError:
            keeper = "the launcher" if board.kept_by_launcher() else "process 0"
            return PeerError(f"{keeper} is gone, and with it the store in which processes meet; noticed in {where}")
        return PeerError(failure.text)

    def reason(self, error: BaseException, where: str) -> Failure:
        """Wait for the reason why a collective has failed; if none comes, report what is known here."""
        self.board.note("waits", self.rank, where)
        if is_late(error):
            self.board.note("late", self.rank)  # gloo then breaks the connection, which is all that others may see
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            time.sleep(POLL)
            if (failure := self.news()) is not None:
                return failure
        waits, left = self.board.all("waits"), self.board.who("left")
        others = [f"; process {rank} waited in {place}" for rank, place in waits.items() if place != where]
        others += [f"; process {rank} has come to its end" for rank in sorted(left)]
        if self.board.who("late"):
            missing = set(range(self.size)) - waits.keys() - left
            return self.report_hang(f"no answer within {self.timeout:g} s in {where}{''.join(others)}", missing)
        return self.report(self.rank, f"processes have lost each other in {where}: {said(error)}{''.join(others)}")

    def report_hang(self, what: str, missing: Set[int]) -> Failure:
        """Write on the board that others are waited for in vain, with what they were doing last."""
        for rank in sorted(missing):
            doing = self.board.read("doing", rank)
            what += f"; process {rank} did not come" + (f" (it was at {doing})" if doing else "")
        return self.report(self.rank, what, missing)

    def leave(self) -> None:
        """Come to an end in good order, together with the others; once that is done, there is nothing to add."""
        if self.has_left:
            return
        self.leaving = True
        self.board.note("left", self.rank)
        self.has_left = True
        try:
            self.wait_for("left", "the end")
        except dist.DistError:
            if board.kept_by_launcher() or self.rank == 0:
                raise
            # the main process keeps the board, and goes with it when it has seen all others leave

    def leave_alone(self) -> None:
        """Come to an end in good order, and wait for the others a little while only: they may be stuck."""
        self.leaving = True
        self.board.note("left", self.rank)
        until = time.monotonic() + PATIENCE
        while len(self.board.who("left")) < self.size and time.monotonic() < until:
            time.sleep(POLL)

    def give_up(self, error: BaseException) -> None:
        """Come to an end by an error: let the others know, and see to it that the person does."""
        self.leaving = True
        if not isinstance(error, PeerError):
            self.report(self.rank, f"process {self.rank} {in_words(error)}")
        if self.rank == 0:
            self.tell_once(error)
            return
        until = time.monotonic() + SAME + PATIENCE
        while not self.board.is_told() and not self.is_dead(0) and time.monotonic() < until:
            time.sleep(POLL)
        self.tell_once(PeerError(self.failure.text) if self.failure else error)


def in_words(error: BaseException) -> str:
    """What a process did, by the error that ends it."""
    if isinstance(error, SystemExit):
        return f"ended with exit code {error.code}"
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted"
    text = "\n".join([str(error).strip(), *getattr(error, "__notes__", ())])
    return f"failed: {text}" if isinstance(error, Refusal) else f"failed: {type(error).__name__}: {text}".rstrip(": ")


def end_now(code: int) -> None:
    """End the process without the usual clearing up, in which a broken process group waits for the others in vain."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
