"""When one process of a job fails, all end: within seconds, with its reason, told once; `watch` says how.

Here is what a job says for it: `watched` is around the whole of it (`world` sees to that), `doing` around what the
processes do together, and `last_words` around what has to be set right even if a process is ended from outside.
"""

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from models.parallel.board import launched
from models.parallel.watch import Tell, Watch, end_now

current: Watch | None = None
"""This process's, while it is one of several."""


@contextmanager
def watched(tell: Tell | None = None) -> Iterator[Watch | None]:
    """Fail with the others; within it is the job. `tell` shows an error to the person, for all processes together.

    A process that was started alone has nothing to watch (None), and tells its own errors.
    """
    global current
    mine = None
    try:
        if current is None and launched() > 1:
            current = mine = Watch(tell)
        yield current
        if mine is not None:
            mine.leave()
    except BaseException as error:
        if (mine is None or not settled(mine, error)) and tell is not None:
            tell(error)
        raise
    finally:
        if mine is not None:
            mine.close()
            current = None


def settled(watch: Watch, error: BaseException) -> bool:
    """Come to an end because of an error, together with the others; False if nobody is there any more to do so with."""
    try:
        watch.leave_alone() if is_in_order(error) else watch.give_up(error)
    except dist.DistError:
        return False
    return True


@contextmanager
def doing(what: str = "") -> Iterator[None]:
    """Say what the processes do together, as in `with doing("the gradients of step 12"):`.

    If a collective within fails because of another process, a PeerError says why, and what was being done.
    """
    watch = current
    if watch is None:
        yield
        return
    before, watch.doing = watch.doing, what or watch.doing
    try:
        yield
    except RuntimeError as error:
        peer = watch.explained(error)
        if peer is None:
            raise
        raise peer from error
    finally:
        watch.doing = before


@contextmanager
def last_words(hook: Tell) -> Iterator[None]:
    """Have something done if the process has to be ended while its main thread is stuck in a collective.

    The hook gets the PeerError that the main thread cannot raise. It runs in another thread, has to be quick, and must
    not call a collective.
    """
    watch = current
    if watch is None:
        yield
        return
    watch.hooks.append(hook)
    try:
        yield
    finally:
        watch.hooks.remove(hook)


def end_if_broken(error: BaseException, code: int | None) -> None:
    """End a process of a job that has failed, with an exit code, or else as Python would end it for the error.

    It ends without the usual clearing up, in which a broken process group waits for the others in vain.
    """
    if not dist.is_initialized() or is_in_order(error):
        return
    if code is None:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
    end_now(code)


def is_in_order(error: BaseException) -> bool:
    """Is it no failure that a process ends so? 0 is success, and 130 and 143 end a run that was asked to stop."""
    return isinstance(error, SystemExit) and error.code in (None, 0, 128 + signal.SIGINT, 128 + signal.SIGTERM)
