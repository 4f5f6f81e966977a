"""Small files that are there whole or not at all, lines that are appended whole, and what is safe from a power cut."""

import os
from pathlib import Path

from models.errors import WriteError

TEMPORARY = (".*.tmp", ".tmp??????")  # what writers that were killed in the middle leave: ours, and safetensors'


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


def make_directory(directory: Path) -> None:
    """Make a directory and those above it, or say why there can be none."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{directory}: cannot be made ({error.strerror}); name another place") from error


def append_line(path: Path, line: str) -> None:
    """Append a line in one unbuffered write: a kill leaves all of it or none.

    A disk that is nearly full takes a part and says so only when the rest comes.
    """
    rest = f"{line}\n".encode()
    with open(path, "ab", buffering=0) as file:
        while rest:
            rest = rest[file.write(rest) :]


def cut_back(path: Path, size: int) -> int:
    """Shorten a file to so many bytes, and give how many lines went."""
    with open(path, "r+b") as file:
        file.seek(size)
        gone = file.read().count(b"\n")
        file.truncate(size)
        os.fsync(file.fileno())
    return gone


def sync_file(path: Path) -> None:
    """Make what was written to a file survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make a rename in this directory survive a power cut, where the system can open directories at all."""
    if os.name == "posix":
        sync_file(directory)
