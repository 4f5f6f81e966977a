"""The key-value head of a GGUF file, without its tensors.

The gguf package reads it too, but builds an array per string: two seconds for a vocabulary of 49,152 tokens.
The head is simple: a magic, a version, two counts, then keys with typed little-endian values.
"""

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from models.errors import CheckpointError

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """All keys of a GGUF file's head with their values; arrays are lists."""
    try:
        with open(path, "rb") as file:
            return _Head(file, path).read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


class _Head:
    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size

    def read(self) -> dict[str, Any]:
        if self.take(4) != MAGIC:
            raise CheckpointError(f"{self.path}: not a GGUF file: it does not start with {MAGIC.decode()}")
        version = self.scalar("I")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path}: GGUF version {version} cannot be read; 2 and 3 can")
        self.scalar("Q")  # the number of tensors
        pairs = self.scalar("Q")
        self.fits(pairs, 13)  # the least: the length of a key, a type and a byte
        metadata = {}
        for _ in range(pairs):
            key = self.string()
            metadata[key] = self.value(self.scalar("I"))
        return metadata

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(self.format(kind))

        item, count = self.scalar("I"), self.scalar("Q")
        if item == STRING:
            self.fits(count, 8)
            return self.strings(count)
        letter = self.format(item)
        self.fits(count, struct.calcsize(letter))
        return list(struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(letter))))

    def format(self, kind: int) -> str:
        if kind not in SCALARS:
            raise CheckpointError(f"{self.path}: GGUF value type {kind} is unknown; the file is damaged")
        return SCALARS[kind]

    def scalar(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(letter)))[0]

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """The next strings, in one loop: a vocabulary has a hundred thousand."""
        found, size, read = [], self.size, self.file.read
        for _ in range(count):
            prefix = read(8)
            length = int.from_bytes(prefix, "little")
            data = read(min(length, size))
            if len(prefix) < 8 or len(data) < length:
                raise CheckpointError(
                    f"{self.path}: the GGUF head ends within a string; the file is truncated"
                )
            found.append(data.decode("utf-8", errors="replace"))
        return found

    def take(self, count: int) -> bytes:
        self.fits(count, 1)  # a damaged length must not reserve memory
        data = self.file.read(count)
        if len(data) < count:
            raise CheckpointError(f"{self.path}: the GGUF head ends early; the file is truncated")
        return data

    def fits(self, count: int, width: int) -> None:
        if count * width > self.size:
            raise CheckpointError(
                f"{self.path}: a GGUF length of {count} exceeds the file's {self.size} bytes;"
                " the file is truncated or damaged"
            )
