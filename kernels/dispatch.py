"""Which form of an operator runs where: the one seam between what is computed and how fast.

A row names an operator and gives its form for a type of device; a device without one gets the definition.
A faster form takes and returns exactly what the definition does.
"""

from collections.abc import Callable
from typing import Any

import torch

from kernels import reference

FORMS: dict[str, dict[str, Callable[..., Any]]] = {
    "quantize": {},
    "dequantize": {},
}


def form(operator: str, device: torch.device) -> Callable[..., Any]:
    """The form of an operator for a device."""
    return FORMS[operator].get(device.type) or getattr(reference, operator)
