"""One process at a time writes a run: a lock that the system lets go of when its holder ends, however it ends."""

import os
from pathlib import Path

from models.errors import ConfigError

LOCK = ".lock"


def lock(directory: Path) -> int | None:
    """Take a run's directory, or refuse if another process has it; `unlock` takes what comes back.

    None comes where the system or the file system has no locks; there nobody is kept out.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"{directory} is being written by a process that is still running; wait for it, or stop it first"
        ) from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def unlock(descriptor: int | None) -> None:
    """Let others have the directory."""
    if descriptor is not None:
        os.close(descriptor)
