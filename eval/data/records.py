"""The records of a data file, found in one pass and read one by one when asked for.

What is kept of a record is where it is: 20 bytes, however long it is. So a file can be larger than memory, and
an order that jumps through it costs a seek a record. The pass decodes every record once, since only that tells
which ones cannot be read; a record that cannot be is given as the reason, so that several can be listed, and a
file that cannot be is refused.
"""

import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

from eval.data.json_records import ITEMS, json_lines, json_list, json_object
from eval.data.stream import Found, Stream
from eval.data.tables import plain_fields, plain_rows, row_of, rows
from models.errors import DataError

Record = dict[str, Any]

HEAD = 2**16  # bytes that tell what a file is


class RecordFile:
    """One file; its records are known once it is scanned."""

    def __init__(self, path: Path, columns: Sequence[str] = (), plain: bool = False, exact: bool = False) -> None:
        """A table may be without quotes, whatever its name, and without a header where its columns are given.

        With `exact`, Windows line ends within a table's fields stay as they are.
        """
        self.path, self.columns, self.plain, self.exact = path, list(columns), plain, exact
        self.form = "TSV" if plain else form(path, beginning(path))
        self.head: Record = {}  # of an object, what all of its items share
        self.sha256, self.size, self.state = "", 0, (0, 0)
        self.starts, self.sizes, self.lines = array("Q"), array("I"), array("Q")

    def scan(self) -> Iterator[Record | ValueError]:
        """Every record in turn; in place of one that cannot be read, the reason."""
        with opened(self.path) as file:
            self.state = state(file)
            stream = Stream(self.path, file)
            for line, start, stop, value in self.found(stream):
                self.starts.append(start)
                self.sizes.append(stop - start)
                self.lines.append(line)
                if self.form != "object":
                    yield self.record(value)
            self.sha256, self.size = stream.hash.hexdigest(), stream.size
        if self.form == "object":  # what its items share may stand behind them
            yield from (self[number] for number in range(len(self)))

    def found(self, stream: Stream) -> Iterator[Found]:
        if self.form in ("CSV", "TSV"):
            if self.plain:
                return plain_rows(stream, self.columns)
            return rows(stream, self.form, self.columns, self.exact)
        if self.form == "list":
            return json_list(stream)
        return json_object(stream, self.head) if self.form == "object" else json_lines(stream)

    def record(self, value: Any) -> Record | ValueError:
        """A value as a record; an item of an object has what the object says of all of them."""
        if self.head:
            return {**self.head, ITEMS: [value]}
        return value if isinstance(value, (dict, ValueError)) else ValueError(f"is {kind(value)}, not an object")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Record:
        """One record, read from the file."""
        with opened(self.path) as file:
            if state(file) != self.state:
                raise DataError(f"data: {self.path} has changed since it was opened; start again")
            file.seek(self.starts[number])
            text = file.read(self.sizes[number]).decode()
        if self.form not in ("CSV", "TSV"):
            value = json.loads(text)
        elif self.plain:
            value = plain_fields(text, self.columns)
        else:
            value = row_of(text, self.form, self.columns, self.exact)
        record = self.record(value)
        if isinstance(record, ValueError):
            raise record
        return record

    def where(self, number: int) -> str:
        """File and line of a record."""
        return f"{self.path}:{self.lines[number]}"


def opened(path: Path) -> BufferedReader:
    """A file to read from, more than once: a pipe cannot be."""
    if path.exists() and not path.is_file():
        raise DataError(f"data: {path} is not a regular file; write the records to one")
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"data: {path} cannot be read: {error.strerror}") from error


def state(file: BufferedReader) -> tuple[int, int]:
    """Size and time of change, by which a changed file is told."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def beginning(path: Path) -> str:
    """A file's first characters, for telling what it is; what is not UTF-8 is refused when it is scanned."""
    with opened(path) as file:
        return file.read(HEAD).decode("utf-8-sig", "replace")


def form(path: Path, text: str) -> str:
    """What a file is: CSV or TSV by its name, else a JSON list, lines of JSON, or one JSON object."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return suffix[1:].upper()
    if text.lstrip().startswith("["):
        return "list"
    first, _, second = text.lstrip().partition("\n")
    if suffix == ".jsonl" or not first.startswith("{") or second.lstrip().startswith("{"):
        return "lines"
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return "object" if second.strip() else "lines"
    return "lines"


def kind(value: Any) -> str:
    """What a JSON value is, in a person's words."""
    if value is None:
        return "null"
    return {bool: "a truth value", str: "a text", list: "a list", dict: "an object"}.get(type(value), "a number")


UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text whose control characters and text-direction marks are written out, so that no terminal obeys them."""
    return UNPRINTABLE.sub(lambda mark: mark[0].encode("unicode_escape").decode(), text)
