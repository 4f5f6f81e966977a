"""A data file read once from front to back: hashed on the way, and known to be UTF-8 as far as it was read.

A byte-order mark and Windows line ends are no concern of a reader's and simply accepted. Memory is bounded by
the longest record, and a record has an end: a quote that is never closed must not read all of a large file.
"""

import codecs
from collections.abc import Iterator
from hashlib import sha256
from io import BufferedReader
from pathlib import Path
from typing import Any

from models.errors import DataError

Found = tuple[int, int, int, Any]  # a record's line, its first byte and the one behind it; its value or a ValueError

LONGEST = 2**28  # bytes of one record; beyond that a quote or a line end is missing

BINARY = {  # how files begin that are no text, and what to do with them
    b"\xff\xfe": "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "is compressed by gzip; unpack it: gzip -d",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it: zstd -d",
    b"PAR1": "is a Parquet file; write its rows as JSON lines",
}


class Stream:
    """The text of an open file, by lines or by pieces."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self.file = path, file
        self.hash = sha256()
        self.size = 0  # bytes read so far
        self.line = 1  # of the next piece
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        beginning = file.peek(4)
        for mark, advice in BINARY.items():
            if beginning.startswith(mark):
                raise DataError(f"data: {path} {advice}")
        if beginning.startswith(codecs.BOM_UTF8):
            self.take(file.read(3))

    def lines(self) -> Iterator[tuple[int, int, str]]:
        """Number, first byte and text of each line; only newlines end one, though Unicode has other separators."""
        for number, raw in enumerate(iter(lambda: self.file.readline(LONGEST), b""), 1):
            start = self.size
            self.take(raw)
            if len(raw) == LONGEST:
                raise self.endless(number)
            try:
                yield number, start, raw.decode()
            except UnicodeDecodeError as error:
                raise self.not_utf8(number, start, error) from error

    def piece(self, size: int) -> str:
        """The next characters, about as many as asked for; none at the file's end."""
        text = ""
        while not text:
            start = self.size - len(self.decoder.getstate()[0])  # a character may have begun in the piece before
            raw = self.file.read(size)
            self.take(raw)
            try:
                text = self.decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                line = self.line + error.object[: error.start].count(b"\n")
                raise self.not_utf8(line, start, error) from error
            if not raw:
                break
        self.line += text.count("\n")
        return text

    def rest(self) -> None:
        """Read on to the end, so that the hash is that of the whole file."""
        while self.piece(2**20):
            pass

    def take(self, raw: bytes) -> None:
        self.hash.update(raw)
        self.size += len(raw)

    def not_utf8(self, line: int, start: int, error: UnicodeDecodeError) -> DataError:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {start + error.start}"
        return DataError(f"data: {self.path}:{line}: is not UTF-8 ({byte}); convert the file with iconv")

    def endless(self, line: int) -> DataError:
        return DataError(
            f"data: {self.path}:{line}: a record that begins here has no end within {LONGEST >> 20} MiB; "
            "a line end, a bracket or a closing quote may be missing"
        )
