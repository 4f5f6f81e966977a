"""Fields of a config.json, each of the type and in the range that it must have.

Files come from strangers, and a size is believed before any tensor is: a text where a number belongs, a NaN, or a
width of 10**12 is refused here, by name, and not found out by whatever breaks first.
"""

import math
from typing import Any

from models.errors import CheckpointError

LARGEST_SIZE = 2**30
LARGEST_ID = 2**31


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


def real(value: Any, where: str) -> float:
    """A positive finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"{where} is {short(value)}; a positive finite number is needed")
    try:
        return float(value)
    except OverflowError as error:
        raise CheckpointError(f"{where} is {short(value)}; a positive finite number is needed") from error


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


def table(value: Any, where: str) -> dict[str, Any]:
    """A group of fields, empty where the file has none."""
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{where} is {value!r:.80}; an object with fields is needed")
    return value or {}


def short(value: Any) -> str:
    """What came, unless it has more digits than anyone reads."""
    return "enormous" if isinstance(value, int) and abs(value) > 2**256 else f"{value!r:.80}"
