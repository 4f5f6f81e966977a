"""Small data files for tests, and the examples that they read as."""

import json
from pathlib import Path

import pytest

from models.errors import DataError
from train.data.examples import Examples, open_examples


def write(folder: Path, content: object, name: str = "my.jsonl") -> Path:
    """A file of records as JSON lines, or of the text itself; folders on the way are made."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str):
        assert isinstance(content, list)
        content = "".join(json.dumps(record) + "\n" for record in content)
    path.write_text(content, encoding="utf-8", newline="")
    return path


def examples(folder: Path, content: object, name: str = "my.jsonl", format: str | None = None) -> Examples:
    return open_examples(write(folder, content, name), format)


def refused(folder: Path, content: object, message: str, name: str = "my.jsonl", format: str | None = None) -> None:
    """The file is refused with a message that matches."""
    with pytest.raises(DataError, match=message):
        examples(folder, content, name, format)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
