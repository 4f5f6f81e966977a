"""Which form of an operator runs where: the one seam between what is computed and how fast.

The table is read from the top, and the first row wins whose device is the tensors' and whose `accepts` says yes to
the operator's first two arguments. Every form of an operator takes and returns what its definition does. A
device without a faster form gets the definition, so nothing here can fail.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch

from kernels.planned import kind_of
from nf4 import QuantizedTensor


class Row(NamedTuple):
    """One form of an operator, on one type of device."""

    operator: str
    device: str
    accepts: Callable[[Any, Any], bool]
    form: Callable[..., Any]


def always(*_: Any) -> bool:
    return True


@lru_cache
def table(planned_gpu: bool = False) -> tuple[Row, ...]:
    """The forms that there are, the fastest first; with those of a GPU that is not here but planned for.

    (Imported here, since some are built from others.)
    """
    from kernels import chunked, cpu, cpu_attention, cpu_layers, cpu_updates, dense, layers, reference, updates

    return (
        *(gpu_rows() if planned_gpu or torch.cuda.is_available() else ()),  # without a GPU nobody need wait for Triton
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
        # around the products
        Row("rms_norm", "cpu", cpu_layers.accepts_norm, cpu_layers.rms_norm),
        Row("rms_norm", "any", always, layers.rms_norm),
        Row("rms_norm_grad", "cpu", cpu_layers.accepts_norm, cpu_layers.rms_norm_grad),
        Row("rms_norm_grad", "any", always, layers.rms_norm_grad),
        Row("rotate", "cpu", cpu_layers.accepts, cpu_layers.rotate),
        Row("rotate", "any", always, layers.rotate),
        Row("swiglu", "cpu", cpu_layers.accepts, cpu_layers.swiglu),
        Row("swiglu", "any", always, layers.swiglu),
        Row("swiglu_grad", "cpu", cpu_layers.accepts, cpu_layers.swiglu_grad),
        Row("swiglu_grad", "any", always, layers.swiglu_grad),
        Row("attention", "cpu", cpu_attention.accepts, cpu_attention.attention),
        Row("attention", "any", always, layers.attention),
        Row("attention_grad", "cpu", cpu_attention.accepts, cpu_attention.attention_grad),
        Row("attention_grad", "any", always, layers.attention_grad),
        Row("cross_entropy", "cpu", cpu_layers.accepts, cpu_layers.rows_cross_entropy),
        Row("cross_entropy", "any", always, chunked.rows_cross_entropy),
        # what an optimizer does, to lists of tensors
        Row("adamw", "cpu", cpu_updates.accepts, cpu_updates.adamw),
        Row("adamw", "any", always, updates.adamw),
        Row("adamw_8bit", "cpu", cpu_updates.accepts, cpu_updates.adamw_8bit),
        Row("adamw_8bit", "any", always, updates.adamw_8bit),
        Row("lion", "cpu", cpu_updates.accepts, cpu_updates.lion),
        Row("lion", "any", always, updates.lion),
    )


def gpu_rows() -> tuple[Row, ...]:
    """Triton's forms. Products: few tokens and a middle range are fused, and more decode the weight first."""
    from kernels import (
        adamw,
        adamw8,
        cross_entropy,
        dropout,
        expand,
        glu,
        lion,
        matmul_few,
        matmul_grad,
        matmul_mid,
        norm,
        project,
        restore,
        rope,
        store,
    )

    rows = (
        Row("quantize", "cuda", store.accepts, store.quantize),
        Row("dequantize", "cuda", restore.accepts, restore.dequantize),
        Row("matmul", "cuda", matmul_few.accepts, matmul_few.matmul),
        Row("matmul", "cuda", matmul_mid.accepts, matmul_mid.matmul),
        Row("matmul", "cuda", expand.accepts, expand.matmul),
        Row("matmul_grad", "cuda", matmul_grad.accepts, matmul_grad.matmul_grad),
        Row("matmul_grad", "cuda", expand.accepts, expand.matmul_grad),
        Row("project", "cuda", project.accepts, project.project),
        Row("project_grad", "cuda", project.accepts, project.project_grad),
        Row("drop", "cuda", dropout.accepts, dropout.drop),
        Row("rms_norm", "cuda", norm.accepts, norm.rms_norm),
        Row("rms_norm_grad", "cuda", norm.accepts, norm.rms_norm_grad),
        Row("rotate", "cuda", rope.accepts, rope.rotate),
        Row("swiglu", "cuda", glu.accepts, glu.swiglu),
        Row("swiglu_grad", "cuda", glu.accepts, glu.swiglu_grad),
        Row("cross_entropy", "cuda", cross_entropy.accepts, cross_entropy.cross_entropy),
        Row("adamw", "cuda", adamw.accepts, adamw.adamw),
        Row("adamw_8bit", "cuda", adamw8.accepts, adamw8.adamw_8bit),
        Row("lion", "cuda", lion.accepts, lion.lion),
    )
    return tuple(row._replace(form=on_its_device(row.form)) for row in rows)


def on_its_device(form: Callable[..., Any]) -> Callable[..., Any]:
    """The form, launched on the GPU of its first argument: Triton itself takes the current one."""

    @wraps(form)
    def launched(first: Any, *others: Any, **options: Any) -> Any:
        device = tensor_of(first).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():  # to set it takes time
            return form(first, *others, **options)
        with torch.cuda.device(device):
            return form(first, *others, **options)

    return launched


def tensor_of(first: Any) -> torch.Tensor:
    """A tensor that is where an argument is: a tensor, a stored weight, or a list; an empty list is on no GPU."""
    if isinstance(first, QuantizedTensor):
        return first.packed
    if isinstance(first, torch.Tensor):
        return first
    return first[0] if first else torch.empty(0)


def form(operator: str, device: torch.device, first: Any, second: Any = None) -> Callable[..., Any]:
    """The form of an operator for arguments that begin with `first` and `second`."""
    kind = kind_of(device)
    rows = table(kind != device.type and kind == "cuda")
    return next(row.form for row in those_of(rows, operator, kind) if row.accepts(first, second))


def those_of(rows: tuple[Row, ...], operator: str, kind: str) -> list[Row]:
    """The rows of an operator for a type of device. Looked for once: a model asks thousands of times a step."""
    _, found = searched.setdefault(id(rows), (rows, {}))
    if (operator, kind) not in found:
        found[operator, kind] = [row for row in rows if row.operator == operator and row.device in (kind, "any")]
    return found[operator, kind]


# By the number of a table, which stays its own as long as the table is held here.
searched: dict[int, tuple[tuple[Row, ...], dict[tuple[str, str], list[Row]]]] = {}
