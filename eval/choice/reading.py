"""Records of a file as documents; the first that cannot be one is refused by its line."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.data.records import RecordFile, kind
from eval.task import Document, Spec
from models import ConfigError, DataError


def documents(path: Path, convert: Callable[[Document], Document]) -> list[Document]:
    """Every record of a file (CSV, TSV, JSON lines or a JSON list); `convert` says what is wrong by a ValueError."""
    file, found = RecordFile(path), []
    for number, record in enumerate(file.scan()):
        try:
            if isinstance(record, ValueError):
                raise record
            found.append(convert(record))
        except ValueError as error:
            raise DataError(f"data: {file.where(number)}: {error}") from error
    if not found:
        raise DataError(f"data: {path}: has no records")
    return found


def place(spec: Spec, wanted: str) -> Path:
    """The data's path, which has to be given and to be there."""
    if spec.data is None:
        raise ConfigError(f"{spec.name} needs data: {wanted}; give it by --data PATH")
    if not spec.data.exists():
        raise DataError(f"data: {spec.data} is not there; {spec.name} needs {wanted}")
    return spec.data


def text(record: Document, key: str) -> str:
    """A text of a record, which may be empty."""
    if key not in record:
        raise ValueError(f"has no {key!r}; its keys are {', '.join(map(str, record))}")
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"its {key!r} is {kind(value)}, not a text")
    return value


def texts(record: Document, key: str) -> list[str]:
    """A list of texts."""
    value = record.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"its {key!r} is not a list of texts ({brief(value)} came)")
    return value


def whole(value: Any) -> int | None:
    """A number that came as such or as digits."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def chosen(choices: Sequence[str], gold: int | None, came: Any, expected: str) -> int:
    """The number of the right choice, checked, as are the choices."""
    if len(choices) < 2:
        raise ValueError(f"has {len(choices)} choice(s); there must be at least 2")
    if blank := [number for number, choice in enumerate(choices, 1) if not choice.strip()]:
        raise ValueError(f"its choice {blank[0]} of {len(choices)} is empty")
    if gold is None or not 0 <= gold < len(choices):
        hint = "; the answers of test sets are often not published" if came in (None, "") else ""
        raise ValueError(f"its answer is {brief(came)}, but {expected} is expected{hint}")
    return gold


def brief(value: Any) -> str:
    """A JSON value in few characters."""
    shown = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
