"""Records of a table, CSV or TSV: a row each, by the names in the header.

GLUE's tables know no quotes: a quote is a character as any other, and every line is a row.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from eval.data.stream import LONGEST, Found, Stream
from models.errors import DataError

csv.field_size_limit(2**31 - 1)  # its default would refuse a text of more than 128 KiB


class WrongWidth(ValueError):
    """A row with another number of fields than the header."""


def rows(stream: Stream, name: str, columns: list[str], exact: bool = False) -> Iterator[Found]:
    """The rows of a quoted table, CSV or TSV; the header's names go to `columns`, unless they are there.

    A Windows line end within a field becomes a newline, if not `exact`.
    """
    feed = Feed(stream, exact)
    reader = csv.reader(feed, dialect(name), strict=True)
    while True:
        feed.begin()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"data: {stream.path}:{feed.line}: is not {name} ({error})") from error
        if not columns:
            columns += named(row, stream)
        elif row:
            yield feed.line, feed.start, stream.size, fields(row, columns)


def plain_rows(stream: Stream, columns: list[str]) -> Iterator[Found]:
    """The rows of a table without quotes; the header's names go to `columns`, unless they are there."""
    for number, start, text in stream.lines():
        line = text.rstrip("\r\n")
        if not columns:
            columns += named(line.split("\t"), stream)
        elif line:
            yield number, start, stream.size, plain_fields(line, columns)


class Feed:
    """The lines of a table for a CSV reader, with the place where its current row begins."""

    def __init__(self, stream: Stream, exact: bool = False) -> None:
        self.stream, self.lines, self.exact = stream, stream.lines(), exact
        self.line, self.start, self.fresh = 1, 0, True

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> str:
        number, start, text = next(self.lines)
        if self.fresh:
            self.line, self.start, self.fresh = number, start, False
        elif self.stream.size - self.start > LONGEST:
            raise self.stream.endless(self.line)
        return text if self.exact or not text.endswith("\r\n") else f"{text[:-2]}\n"

    def begin(self) -> None:
        """The next line begins a row."""
        self.fresh = True


def row_of(text: str, name: str, columns: Sequence[str], exact: bool = False) -> Any:
    """One row of a quoted table from its text."""
    lines = io.StringIO(text if exact else text.replace("\r\n", "\n"), newline="\n")
    return fields(next(csv.reader(lines, dialect(name), strict=True)), columns)


def plain_fields(line: str, columns: Sequence[str]) -> Any:
    return fields([unquoted(field) for field in line.rstrip("\r\n").split("\t")], columns)


def unquoted(field: str) -> str:
    """A field without the quotes that a CSV writer put around it: it does where there are quotes within."""
    inner = field[1:-1]
    written = len(field) > 2 and field[0] == field[-1] == '"' and '""' in inner and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if written else field


def fields(row: Sequence[str], columns: Sequence[str]) -> Any:
    """A row by its columns' names, or what is wrong with it."""
    if len(row) != len(columns):
        return WrongWidth(f"has another number of fields ({len(row)}) than the header ({len(columns)})")
    return dict(zip(columns, row, strict=True))


def named(header: list[str], stream: Stream) -> list[str]:
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise DataError(f"data: {stream.path}:1: the header names the column {twice[0]!r} twice; rename one")
    return header


def dialect(name: str) -> str:
    return "excel-tab" if name == "TSV" else "excel"
