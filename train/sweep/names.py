"""How cells are called: short, readable, safe as a directory and in a shell, and the same every time.

rank=8,lr=1e-4,seed=42
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from hashlib import sha256
from typing import Any

SHORT = {"learning_rate": "lr"}
VALUE, NAME = 32, 160  # letters; file systems allow 255 bytes, and what is beside a cell needs some


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Give each dotted key's last part, or the whole key where the last parts of two are equal.

    >>> short_keys(["lora.rank", "optimizer.learning_rate"])
    {'lora.rank': 'rank', 'optimizer.learning_rate': 'lr'}
    >>> short_keys(["lora.dtype", "dtype"])
    {'lora.dtype': 'lora.dtype', 'dtype': 'dtype'}
    """
    parts = [key.rpartition(".")[2] for key in keys]
    often = Counter(parts)
    return {key: SHORT.get(part, part) if often[part] == 1 else key for key, part in zip(keys, parts, strict=True)}


def cell_name(values: Mapping[str, Any]) -> str:
    """Give the name of a cell from its settings.

    >>> cell_name({"rank": 8, "lr": 1e-4, "seed": 42})
    'rank=8,lr=1e-4,seed=42'
    """
    name = ",".join(f"{key}={cut(safe(text_of(value)), VALUE)}" for key, value in values.items())
    return cut(name, NAME)


def text_of(value: Any) -> str:
    """Give a value as people write it.

    >>> text_of(2e-4), text_of(16.0), text_of(0.05), text_of(True), text_of(("q_proj", "v_proj"))
    ('2e-4', '16', '0.05', 'true', 'q_proj+v_proj')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return "+".join(map(text_of, value))
    if isinstance(value, dict):
        return "+".join(f"{key}.{text_of(item)}" for key, item in value.items())
    return str(value)


def number(value: float) -> str:
    """Give the shorter of a number's plain and scientific forms, neither of which rounds it."""
    exact = Decimal(repr(value + 0.0))  # -0.0 is 0
    if not exact.is_finite():
        return repr(value)
    sign, digits, exponent = exact.normalize().as_tuple()
    assert isinstance(exponent, int)
    first, rest = digits[0], "".join(map(str, digits[1:]))
    scientific = f"{'-' * sign}{first}{'.' * bool(rest)}{rest}e{exponent + len(rest)}"
    plain = f"{exact.normalize():f}"
    return min(plain, scientific, key=len)


def safe(text: str) -> str:
    """Replace what a file system or a shell could take for something else."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-") or "empty"


def cut(text: str, length: int) -> str:
    """Shorten a text that is too long, so that two that differ do so still."""
    return text if len(text) <= length else f"{text[: length - 9]}-{sha256(text.encode()).hexdigest()[:8]}"
