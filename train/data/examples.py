"""The examples of a data file, one at a time: as many as the file has, whatever fits into memory.

Opening reads every record once and makes its example, so that all that is wrong is told at once; then only the
places are kept, and an example is made again when it is asked for. What does not fit is refused with file and
line, the first few together: a dataset that is silently half empty costs a run.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from eval.data.records import RecordFile, beginning
from eval.superni.tasks import is_official, split_files
from models.errors import DataError
from train.data import glue
from train.data.class_formats import class_names, class_of
from train.data.example import Example, Kind
from train.data.formats import FORMATS, known
from train.data.oasst import read_thread
from train.data.order import shuffled
from train.data.scan import Scan, Skipped, Sources, parts

__all__ = ["Examples", "FileFacts", "Kind", "open_examples"]

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")  # files of a directory that are read


@dataclass(frozen=True)
class FileFacts:
    """What tells a file from another one."""

    name: str
    bytes: int
    sha256: str


class Examples(Sequence[Example]):
    """Every example of a file, or of a directory of files, read when it is asked for."""

    path: Path
    format: str
    """The layout of its records."""
    kind: Kind
    """What is learned: a text, the number of a class, or a number."""
    label_names: tuple[str, ...]
    """The classes by number; none where a text or a number is learned."""
    records: int
    """Records in the files; one may be several examples, a part of one, or passed over."""
    skipped: list[Skipped]
    """What was passed over, as its data set means it."""

    def __init__(self, path: Path, sources: Sources, scan: Scan) -> None:
        assert scan.format is not None
        self.path, self.format, self.sources, self.places = path, scan.format, sources, scan.places
        self.layout = FORMATS[self.format]
        self.kind = self.layout.kind
        self.label_names = class_names(scan.classes) if self.layout.classes else self.layout.label_names
        self.records, self.skipped = scan.total, list(scan.skipped.values())

    @property
    def files(self) -> list[FileFacts]:
        """Name, size and hash of each file."""
        return [FileFacts(file.path.name, file.size, file.sha256) for file in self.sources.files]

    def __len__(self) -> int:
        return len(self.places)

    def keep(self, per_task: int, seed: int) -> None:
        """Leave out all but so many instances of each Super-NaturalInstructions task, drawn by the seed."""
        if self.format != "superni":
            return
        kept, counts = [], Counter[tuple[int, int]]()
        for number in shuffled(len(self), seed, 0, "instances").tolist():
            task = self.sources.whole(self.places[number][0][0])
            counts[task] += 1
            if counts[task] <= per_task:
                kept.append(number)
        self.places.keep(sorted(kept))

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        rows, part = self.places[range(len(self))[index]]
        records = [self.sources.record(row) for row in rows]
        where = self.sources.where(rows[0])
        if self.layout.threads:
            return replace(read_thread(records), where=where)
        record = parts(self.layout, records[0])[part]
        example = replace(self.layout.read(record), where=where)
        if self.layout.classes:
            example = replace(example, label=self.label_names.index(str(class_of(record))))
        return example


def open_examples(path: str | Path, format: str | None = None) -> Examples:
    """The examples of a file or of a directory of files; what cannot be used is refused with file and line."""
    path = Path(path)
    if format is not None:
        known(format)
    files = [record_file(file, format) for file in data_files(path)]
    scan = Scan(format)
    for file in files:
        scan.read(file)
    sources = Sources(files)
    scan.finish(path, sources)
    return Examples(path, sources, scan)


def record_file(path: Path, format: str | None) -> RecordFile:
    plain, columns = False, ()
    if path.suffix.lower() == ".tsv":
        plain, columns = glue.table(path, beginning(path), format)
    return RecordFile(path, columns, plain)


PARTS = re.compile(r"(train|dev|test|valid|validation|val|eval)\b", re.IGNORECASE)


def data_files(path: Path) -> list[Path]:
    """The file, or the files of a directory in the order of their names."""
    if not path.is_dir():
        return [path]
    if is_official(path):
        return split_files(path, "train")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise DataError(
            f"data: {path} has no files that end in {', '.join(SUFFIXES)}; name a file, or such a directory"
        )
    split = sorted({file.name for file in files if PARTS.match(file.name)})
    if len(split) > 1:
        raise DataError(f"data: {path} holds parts of one data set, {' and '.join(split)}; name the file to train on")
    return files
