"""One process at a time: a lock on a file that the system lets go of when its holder ends, however it ends."""

import os
from pathlib import Path


class Held(Exception):
    """Another process has the lock."""


def lock(path: Path) -> int | None:
    """Take the lock of a file, which is made, or raise Held; `unlock` takes what comes back.

    None comes where the system or the file system has no locks; there nobody is kept out.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Held(f"{path} is held by another process") from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def unlock(descriptor: int | None) -> None:
    """Let others have it."""
    if descriptor is not None:
        os.close(descriptor)
