"""Fields of a config.json, each of the type and in the range that it must have.

Files come from strangers, and a size is believed before any tensor is: a text where a number belongs, a NaN, or a
width of 10**12 is refused here, by name, and not found out by whatever breaks first.
"""

from collections.abc import Collection
from dataclasses import fields
from typing import Any

from models.errors import CheckpointError

LARGEST_SIZE = 2**30
LARGEST_ID = 2**31
LARGEST_REAL = 2.0**1000


def values_of(config: type, raw: dict[str, Any], needed: Collection[str], where: str) -> dict[str, Any]:
    """What a file says of the fields of a config, none of it looked at yet; `needed` are those without a default."""
    values = {f.name: raw[f.name] for f in fields(config) if raw.get(f.name) is not None}
    absent = [name for name in needed if name not in values]
    if absent:
        raise CheckpointError(f"{where}: lacks {', '.join(absent)}")
    return values


def check_sizes(config: Any, names: Collection[str]) -> None:
    """Refuse a config, however it was made, that has none of something."""
    for name in names:
        if getattr(config, name) < 1:
            raise CheckpointError(f"config: {name} is {getattr(config, name)}; it must be at least 1")


def number(value: Any, where: str) -> int:
    """A whole number; `where` names the file and the field."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"{where} is {value!r:.80}; a whole number is needed")
    return value


def size(value: Any, where: str) -> int:
    """A count or a width: at least 1, and no more than any model has."""
    if not 1 <= number(value, where) <= LARGEST_SIZE:
        raise CheckpointError(f"{where} is {short(value)}; it must be at least 1 and at most {LARGEST_SIZE}")
    return value


def finite(value: Any, where: str) -> float:
    """A number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST_REAL:
        raise CheckpointError(f"{where} is {short(value)}; a finite number is needed")
    return float(value)


def real(value: Any, where: str) -> float:
    """A positive finite number."""
    found = finite(value, where)
    if found <= 0:
        raise CheckpointError(f"{where} is {short(value)}; a positive finite number is needed")
    return found


def flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise CheckpointError(f"{where} is {value!r:.80}; true or false is needed")
    return value


def token_id(value: Any, where: str) -> int:
    """An id; some files write -1 for none."""
    if not -1 <= number(value, where) < LARGEST_ID:
        raise CheckpointError(f"{where} is {short(value)}; a token's id is needed")
    return value


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """One id, several, or none."""
    several = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(token_id(id, where) for id in several)


def written_ids(ids: tuple[int, ...]) -> int | list[int] | None:
    """What `token_ids` reads as these; None says that there are none, where absence would mean a default."""
    return ids[0] if len(ids) == 1 else list(ids) or None


def table(value: Any, where: str) -> dict[str, Any]:
    """A group of fields, empty where the file has none."""
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{where} is {value!r:.80}; an object with fields is needed")
    return value or {}


def short(value: Any) -> str:
    """What came, unless it has more digits than anyone reads."""
    return "enormous" if isinstance(value, int) and abs(value) > 2**256 else f"{value!r:.80}"
