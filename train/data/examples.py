"""The examples of a data file, one at a time: as many as the file has, whatever fits into memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from train.data.formats import Example, read_examples

Kind = Literal["text", "classification", "regression"]


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Every record of a file in one form, read when it is asked for."""

    path: Path
    format: str
    """The layout of its records."""
    kind: Kind
    """What is learned: a text, the number of a class, or a number."""
    label_names: tuple[str, ...]
    """The classes by number; none where a text or a number is learned."""
    items: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Sequence[Example]": ...
    def __getitem__(self, index: int | slice) -> "Example | Sequence[Example]":
        return self.items[index]


def open_examples(path: str | Path, format: str | None = None) -> Examples:
    """The examples of a file or of a directory of files; what cannot be used is refused with file and line."""
    items, name = read_examples(path, format)
    return Examples(Path(path), name, "text", (), tuple(items))
