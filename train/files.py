"""Small files that are there whole or not at all, and lines that are appended whole."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file aside, sync it and put it in place, so that a reader finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_directory(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append a line in one unbuffered write: a kill leaves all of it or none."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def sync_directory(directory: Path) -> None:
    """Make a rename in this directory survive a power cut, where the system can open directories at all."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
