"""What reading every record of a data set once tells: the layout, where each example is, what cannot be used.

Of an example only its places are kept. The first problems are listed together and the others counted; what the
published data sets are known to have, though nothing can be learned from it, is passed over and counted.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from eval.data.records import Record, RecordFile
from eval.data.tables import WrongWidth
from models.errors import DataError
from train.data.class_formats import class_of
from train.data.example import PassedOver
from train.data.formats import FORMATS, Format, detect, fits, misfit
from train.data.oasst import Forest

SHOWN = 5  # problems that a refusal lists; it gives the number of the others


class Scan:
    """What reading every record once tells: the layout, where the examples are, and what cannot be used."""

    def __init__(self, format: str | None) -> None:
        self.format, self.places, self.forest = format, Places(), Forest()
        self.classes: set[int | str] = set()
        self.total, self.unusable = 0, 0
        self.problems: list[str] = []
        self.skipped: dict[str, Skipped] = {}

    def read(self, file: RecordFile) -> None:
        for number, record in enumerate(file.scan()):
            try:
                self.take(self.total, record, file, number)
            except DataError:
                raise
            except ValueError as error:
                self.unusable += 1
                if self.unusable <= SHOWN:
                    self.problems.append(f"{file.where(number)}: {error}")
            self.total += 1

    def take(self, row: int, record: Record | ValueError, file: RecordFile, number: int) -> None:
        if isinstance(record, ValueError):
            if isinstance(record, WrongWidth) and self.format == "glue-qqp":
                self.skip("rows with another number of fields, as the published QQP has some", file.where(number))
                return
            raise record
        if self.format is None:
            self.format = self.told(record, file, number)
        layout = FORMATS[self.format]
        if not fits(record, layout.keys + layout.named):
            raise ValueError(misfit(record, self.format))
        for part, one in enumerate(parts(layout, record)):
            try:
                if layout.threads:
                    self.forest.add(row, one)
                    continue
                layout.read(one)
            except PassedOver as error:
                self.skip(str(error), file.where(number))
                continue
            self.places.add(row, part)
            if layout.classes:
                self.classes.add(class_of(one))

    def told(self, record: Record, file: RecordFile, number: int) -> str:
        """The layout, which the first record decides: where that has none, what follows is not looked at."""
        try:
            return detect(record, file.path)
        except ValueError as error:
            if self.unusable:
                raise
            raise DataError(f"data: {file.where(number)}: {error}") from error

    def skip(self, reason: str, where: str) -> None:
        self.skipped.setdefault(reason, Skipped(reason, 0, where)).count += 1

    def finish(self, path: Path, sources: "Sources") -> None:
        """Refuse what cannot be used, and what has nothing to use; find the rows that belong together."""
        if self.unusable == 1:
            raise DataError(f"data: {self.problems[0]}")
        if self.unusable:
            more = [f"and {self.unusable - SHOWN} more"] if self.unusable > SHOWN else []
            listed = "".join(f"\n  {problem}" for problem in self.problems + more)
            raise DataError(f"data: {self.unusable} of {self.total} records in {path} cannot be used:{listed}")
        if self.format is None:
            raise DataError(f"data: {path} is empty; at least one record is needed")
        if FORMATS[self.format].threads:
            self.plant(sources)
        if not len(self.places):
            passed = f": passed over were {'; '.join(map(str, self.skipped.values()))}" if self.skipped else ""
            raise DataError(f"data: {path} is empty; at least one record is needed{passed}")

    def plant(self, sources: "Sources") -> None:
        """Examples of the rows that belong together."""
        threads = self.forest.threads()
        for root, thread in threads.items():
            if not thread:
                self.skip("questions without an answer", sources.where(root))
        for number in self.forest.orphans():
            self.skip("replies to messages that the file does not have", sources.where(number))
        self.places.take([thread for thread in threads.values() if thread])


@dataclass
class Skipped:
    """What is passed over for one reason: how much, and where the first of it is."""

    reason: str
    count: int
    first: str

    def __str__(self) -> str:
        return f"{self.count} {self.reason} (first: {self.first})"


class Sources:
    """The records of several files, numbered through."""

    def __init__(self, files: Sequence[RecordFile]) -> None:
        """The files must have been scanned."""
        self.files, self.ends = files, list(accumulate(len(file) for file in files))

    def record(self, row: int) -> Record:
        file, number = self.place(row)
        return file[number]

    def where(self, row: int) -> str:
        """File and line."""
        file, number = self.place(row)
        return file.where(number)

    def place(self, row: int) -> tuple[RecordFile, int]:
        """The file of a record, and its number in it."""
        place = bisect_right(self.ends, row)
        return self.files[place], row - (self.ends[place - 1] if place else 0)

    def whole(self, row: int) -> tuple[int, int]:
        """What a record is an item of, by numbers: the object that its file is, or else itself."""
        file = bisect_right(self.ends, row)
        return file, -1 if self.files[file].form == "object" else row


class Places:
    """Which records each example is made of: one, a part of one, or several."""

    def __init__(self) -> None:
        self.rows, self.parts = array("Q"), array("I")
        self.stops: array[int] | None = None  # where the rows of each example end, if it has several

    def add(self, row: int, part: int) -> None:
        self.rows.append(row)
        self.parts.append(part)

    def take(self, threads: list[list[int]]) -> None:
        """Examples of several rows."""
        self.rows = array("Q", (row for thread in threads for row in thread))
        self.stops = array("Q", accumulate(map(len, threads)))

    def keep(self, numbers: list[int]) -> None:
        """Leave out all other examples, where each is one record or a part of one."""
        assert self.stops is None
        self.rows = array("Q", (self.rows[number] for number in numbers))
        self.parts = array("I", (self.parts[number] for number in numbers))

    def __len__(self) -> int:
        return len(self.rows) if self.stops is None else len(self.stops)

    def __getitem__(self, index: int) -> tuple[list[int], int]:
        if self.stops is None:
            return [self.rows[index]], self.parts[index]
        return self.rows[self.stops[index - 1] if index else 0 : self.stops[index]].tolist(), 0


def parts(layout: Format, record: Record) -> list[Record]:
    """The records, one for each example, that a record stands for."""
    return [record] if layout.split is None else layout.split(record)
