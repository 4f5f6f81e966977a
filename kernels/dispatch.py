"""Which form of an operator runs where: the one seam between what is computed and how fast.

The table is read from the top, and the first row wins whose device is the tensors' and whose `accepts` says yes to
the operator's first two arguments. Every form of an operator takes and returns what its definition does. A
device without a faster form gets the definition, so nothing here can fail.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch


class Row(NamedTuple):
    """One form of an operator, on one type of device."""

    operator: str
    device: str
    accepts: Callable[[Any, Any], bool]
    form: Callable[..., Any]


def always(*_: Any) -> bool:
    return True


@lru_cache
def table() -> tuple[Row, ...]:
    """The forms that there are, the fastest first. (Imported here, since some are built from others.)"""
    from kernels import cpu, dense, reference

    return (
        Row("quantize", "cpu", cpu.accepts_weight, cpu.quantize),
        Row("quantize", "any", always, reference.quantize),
        Row("dequantize", "cpu", cpu.accepts_stored, cpu.dequantize),
        Row("dequantize", "any", always, reference.dequantize),
        # y = x W^T + bias + scaling xa B^T, by how many tokens x has
        Row("matmul", "cpu", cpu.accepts_product, cpu.matmul),
        Row("matmul", "any", always, dense.matmul),
        # dx = dy W + drop(dxa A)
        Row("matmul_grad", "any", always, dense.matmul_grad),
        # xa = drop(x) A^T and dA = dxa^T drop(x)
        Row("project", "any", always, dense.project),
        Row("project_grad", "any", always, dense.project_grad),
        Row("drop", "cpu", cpu.accepts_dropout, cpu.drop),
        Row("drop", "any", always, reference.drop),
    )


def form(operator: str, device: torch.device, first: Any, second: Any = None) -> Callable[..., Any]:
    """The form of an operator for arguments that begin with `first` and `second`."""
    return next(
        row.form
        for row in table()
        if row.operator == operator and row.device in (device.type, "any") and row.accepts(first, second)
    )
