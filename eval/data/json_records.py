"""Records of JSON: a line each, the items of one list, or one object.

A list can be larger than memory. It is decoded item by item from a window of text, which grows only where an
item reaches beyond it; what the decoder says of an item that is cut off by the window's end counts only once
the file has no more.
"""

import json
from collections.abc import Iterator
from typing import Any

from eval.data.stream import LONGEST, Found, Stream
from models.errors import DataError

DECODER = json.JSONDecoder()
WHITE = " \t\n\r"
WINDOW = 2**20  # characters read at a time
NEAR = 16  # characters; an error so near the window's end may come from the cut (the longest is half an escape)

ITEMS = "Instances"  # the key of an object under which its records are: a Super-NaturalInstructions task


def json_lines(stream: Stream) -> Iterator[Found]:
    """One record a line; blank ones pass."""
    for number, start, text in stream.lines():
        if text.strip():
            try:
                value: Any = json.loads(text)
            except (ValueError, RecursionError) as error:
                cut = number > 1 and not text.endswith("\n")
                hint = "the file ends in the middle of this record" if cut else "one record a line is expected"
                value = ValueError(f"is not JSON ({reason(error)}); {hint}")
            yield number, start, stream.size, value


def json_list(stream: Stream) -> Iterator[Found]:
    """The items of a list that is the whole file."""
    window = Window(stream)
    yield from window.items()
    window.finish("the list")


def json_object(stream: Stream, head: dict[str, Any]) -> Iterator[Found]:
    """The items under an object's key "Instances", or else the object itself.

    The other keys go to `head`, and an empty list for the items; it stays empty where there are no items.
    """
    window = Window(stream)
    window.space()
    line, start = window.line, window.offset
    window.expect("{", "an object")
    closed = window.next() == "}"
    while not closed:
        name = window.value()
        if not isinstance(name, str):
            raise window.broken("a key is no text")
        window.space()
        window.expect(":", "a colon after a key")
        if name == ITEMS and window.next() == "[":
            head[ITEMS] = []
            yield from window.items()
        else:
            head[name] = window.value()
        closed = window.comma_or("}", "a key's value")
    window.step(1)
    if ITEMS not in head or head[ITEMS]:
        yield line, start, window.offset, dict(head)
        head.clear()
    window.finish("the object")


class Window:
    """The part of a file's text that is looked at, from the place that is next."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.text, self.place = "", 0
        self.line, self.offset = 1, stream.size  # of the place

    def items(self) -> Iterator[Found]:
        """The items of the list that begins here."""
        self.space()
        self.expect("[", "a list")
        closed = self.next() == "]"
        while not closed:
            self.space()
            line, start = self.line, self.offset
            value = self.value()
            yield line, start, self.offset, value
            closed = self.comma_or("]", "a record")
        self.step(1)

    def value(self) -> Any:
        """The JSON value that begins here, behind white space."""
        self.space()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.place)
            except RecursionError as error:
                raise self.broken(reason(error)) from error
            except ValueError as error:
                near = getattr(error, "pos", 0) > len(self.text) - NEAR
                if (near or str(error).startswith("Unterminated string")) and self.more():
                    continue
                at = self.line + self.text.count("\n", self.place, getattr(error, "pos", self.place))
                raise self.broken(reason(error), at) from error
            if end == len(self.text) and self.more():  # a number might go on
                continue
            self.step(end - self.place)
            return value

    def comma_or(self, close: str, what: str) -> bool:
        """Whether the list or object ends here; a comma is passed, an end is not."""
        mark = self.next()
        if mark not in (",", close):
            raise DataError(
                f"data: {self.stream.path}:{self.line}: expected a comma or {close} after {what}; "
                "the file may be cut off"
            )
        if mark == ",":
            self.step(1)
        return mark == close

    def next(self) -> str:
        """The next character that is not white; none at the file's end."""
        self.space()
        return self.text[self.place : self.place + 1]

    def space(self) -> None:
        """Go to what is not white."""
        while True:
            rest = self.text[self.place : self.place + 64]
            white = len(rest) - len(rest.lstrip(WHITE))
            self.step(white)
            if white < len(rest) or (not rest and not self.more()):
                return

    def expect(self, mark: str, what: str) -> None:
        if self.next() != mark:
            raise self.broken(f"expected {what}")
        self.step(1)

    def step(self, count: int) -> None:
        passed = self.text[self.place : self.place + count]
        self.line += passed.count("\n")
        self.offset += len(passed.encode())
        self.place += count

    def more(self) -> bool:
        """Read on, as much again as is unread, so that a long record is not read over and over; False at the end."""
        rest = self.text[self.place :]
        if len(rest) > LONGEST:
            raise self.stream.endless(self.line)
        new = self.stream.piece(max(WINDOW, len(rest)))
        self.text, self.place = rest + new, 0
        return bool(new)

    def finish(self, what: str) -> None:
        """Nothing but white space may follow."""
        if self.next():
            raise self.broken(f"something follows the end of {what}")

    def broken(self, why: str, line: int | None = None) -> DataError:
        ended = not self.stream.piece(1) and not self.text.rstrip().endswith(("]", "}"))
        cut = "; the file may be cut off" if ended else ""
        return DataError(f"data: {self.stream.path}:{line or self.line}: is not JSON ({why}){cut}")


def reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(": line")[0]
