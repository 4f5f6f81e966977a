"""Files of records: JSON lines, a JSON list, CSV or TSV, each record with the line it begins on.

A byte-order mark and Windows line ends are no concern of a reader's and simply accepted. A record that
cannot be read is given as the reason, so that several can be listed; a file that cannot be is refused.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.errors import DataError

Record = dict[str, Any]


def records(path: Path) -> Iterator[tuple[str, Record | str]]:
    """Every record with its file and line; in place of one that cannot be read, the reason."""
    text = decoded(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        rows = table(path, text)
    elif text.lstrip().startswith("["):
        rows = json_list(path, text)
    else:
        rows = json_lines(text)
    for line, value in rows:
        if isinstance(value, ValueError):
            yield f"{path}:{line}", str(value)
        else:
            yield f"{path}:{line}", value if isinstance(value, dict) else f"is {kind(value)}, not an object"


def decoded(path: Path) -> str:
    """A file's text, a byte-order mark aside; bytes that are not UTF-8 are refused with their line."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"data: {path} cannot be read: {error.strerror}") from error
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"data: {path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        byte = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise DataError(f"data: {path}:{line}: is not UTF-8 ({byte}); convert the file with iconv") from error
    return text.replace("\r\n", "\n")


def json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """One record a line; only newlines end one, though Unicode has other line separators. Blank ones pass."""
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                cut = number == len(lines) > 1
                hint = "the file ends in the middle of this record" if cut else "one record a line is expected"
                value = ValueError(f"is not JSON ({reason(error)}); {hint}")
            yield number, value


def json_list(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The records of one JSON list, decoded one by one so that each has its line."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    place = space(text, 0) + 1
    closed = text[space(text, place) :][:1] == "]"
    while not closed:
        place = space(text, place)
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "lineno", line)
            end = "; the file may be cut off" if not text.rstrip().endswith("]") else ""
            raise DataError(f"data: {path}:{at}: is not JSON ({reason(error)}){end}") from error
        yield line, value
        place = space(text, place)
        if text[place : place + 1] not in (",", "]"):
            at = line + text.count("\n", counted, place)
            raise DataError(f"data: {path}:{at}: expected a comma or ] after a record; the file may be cut off")
        closed, place = text[place] == "]", place + 1


def table(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The rows of a CSV or TSV file by its header's names; a row has the line that it begins on."""
    csv.field_size_limit(2**31 - 1)  # its default would refuse a text of more than 128 KiB
    dialect, name = ("excel-tab", "TSV") if path.suffix.lower() == ".tsv" else ("excel", "CSV")
    rows = csv.DictReader(io.StringIO(text, newline=""), dialect=dialect, strict=True)
    line = 1
    while True:
        try:
            width = len(rows.fieldnames or ())
            line = rows.line_num + 1
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"data: {path}:{line}: is not {name} ({error})") from error
        if None in row or None in row.values():
            yield line, ValueError(f"has another number of fields than the header, which has {width}")
        else:
            yield line, row


def reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(": line")[0]


def space(text: str, place: int) -> int:
    """Where the next thing begins that is not white."""
    white = re.compile(r"[ \t\n\r]*").match(text, place)
    assert white is not None
    return white.end()


def kind(value: Any) -> str:
    """What a JSON value is, in a person's words."""
    if value is None:
        return "null"
    return {bool: "a truth value", str: "a text", list: "a list", dict: "an object"}.get(type(value), "a number")
