"""The products as operators that torch knows: with gradients, and opaque to `torch.compile`, which sees only shapes.

Such an operator takes plain tensors and numbers, so a stored weight comes as its parts. What is saved for backward
is stored anyway (codes, scales, x, the adapter) or small (xa = drop(x) A^T, M x R); never W, and of dropout only
the seed, from which the mask is drawn again.
M tokens, N outputs, K inputs, R rank.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import form
from kernels.operator import operator
from nf4 import QuantConfig, QuantizedTensor
from nf4.blockwise import check_sizes

Q = (
    "Tensor packed, Tensor? absmax, Tensor? absmax_codes, Tensor? nested_absmax, Tensor? absmax_offset, "
    "int[] shape, str codebook, int block_size, int nested_block_size"
)


def parts(q: QuantizedTensor) -> tuple[Any, ...]:
    """A stored weight as the nine arguments that stand for it."""
    c = q.config
    scales = (q.absmax, q.absmax_codes, q.nested_absmax, q.absmax_offset)
    return (q.packed, *scales, q.shape, c.codebook, c.block_size, c.nested_block_size)


def whole(dtype: torch.dtype, parts: Sequence[Any]) -> QuantizedTensor:
    """The stored weight that nine arguments stand for."""
    packed, absmax, absmax_codes, nested_absmax, absmax_offset, shape, codebook, block_size, nested_block_size = parts
    config = config_of(codebook, block_size, absmax is None, nested_block_size)
    return QuantizedTensor(packed, absmax, absmax_codes, nested_absmax, absmax_offset, tuple(shape), dtype, config)


@lru_cache
def config_of(codebook: str, block_size: int, double_quant: bool, nested_block_size: int) -> QuantConfig:
    return QuantConfig(codebook, block_size, double_quant, nested_block_size)


class Values(threading.local):
    needed = True


values = Values()


@contextmanager
def values_needed(needed: bool) -> Iterator[None]:
    """A time in which results of products of stored weights are read, or never: then they need not be computed."""
    before, values.needed = values.needed, needed
    try:
        yield
    finally:
        values.needed = before


def product(x: Tensor, q: QuantizedTensor, *others: Any) -> Tensor:
    check_sizes(q)
    if not values.needed:
        return x.new_empty(x.shape[0], q.shape[0])
    return form("matmul", x.device, x, q)(x, q, *others)


# dequantize


@operator("dequantize", f"({Q}, ScalarType dtype) -> Tensor")
def dequantize(*arguments: Any) -> Tensor:
    *stored, dtype = arguments
    q = whole(dtype, stored)
    return form("dequantize", q.device, q, dtype)(q, dtype)


@dequantize.register_fake
def _(*arguments: Any) -> Tensor:
    packed, *_, shape, _, _, _, dtype = arguments
    return packed.new_empty(shape, dtype=dtype)


# x W^T + bias


@operator("nf4_linear", f"(Tensor x, Tensor? bias, {Q}) -> Tensor")
def linear(x: Tensor, bias: Tensor | None, *stored: Any) -> Tensor:
    q = whole(x.dtype, stored)
    return product(x, q, bias)


@linear.register_fake
def _(x: Tensor, bias: Tensor | None, *stored: Any) -> Tensor:
    return x.new_empty(x.shape[0], stored[5][0])


def keep_stored(ctx: Any, stored: Sequence[Any], *others: Tensor | None) -> None:
    ctx.save_for_backward(*stored[:5], *others)
    ctx.stored = stored[5:]


def saved_stored(ctx: Any) -> tuple[tuple[Any, ...], list[Tensor | None]]:
    saved = ctx.saved_tensors
    return (*saved[:5], *ctx.stored), list(saved[5:])


def linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    keep_stored(ctx, inputs[2:])


@once_differentiable
def linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    stored, _ = saved_stored(ctx)
    need_x, need_bias, *_ = ctx.needs_input_grad
    dx = linear_grad(dy, *stored) if need_x else None
    return (dx, dy.sum(0) if need_bias else None, *[None] * len(stored))


linear.register_autograd(linear_backward, setup_context=linear_context)


@operator("nf4_linear_grad", f"(Tensor dy, {Q}) -> Tensor")
def linear_grad(dy: Tensor, *stored: Any) -> Tensor:
    q = whole(dy.dtype, stored)
    return form("matmul_grad", dy.device, dy, q)(dy, q)


@linear_grad.register_fake
def _(dy: Tensor, *stored: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], stored[5][1])


# x W^T + bias + scaling (drop(x) A^T) B^T


@operator(
    "nf4_lora_linear",
    f"(Tensor x, Tensor a, Tensor b, float scaling, Tensor? bias, float dropout, Tensor? seed, {Q}) "
    "-> (Tensor, Tensor)",
)
def lora_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    *stored: Any,
) -> tuple[Tensor, Tensor]:
    q = whole(x.dtype, stored)
    xa = form("project", x.device, x, a)(x, a, dropout, number(seed))
    return product(x, q, bias, xa, b, scaling), xa


@lora_linear.register_fake
def _(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    *stored: Any,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])


def lora_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, a, b, ctx.scaling, _, ctx.dropout, seed, *stored = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    keep_stored(ctx, stored, x if ctx.needs_input_grad[1] else None, a, b, seed, output[1])


@once_differentiable
def lora_backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    stored, (x, a, b, seed, xa) = saved_stored(ctx)
    need_x, need_a, need_b, _, need_bias, *_ = ctx.needs_input_grad
    dx = da = db = dbias = None
    if dy is not None:
        assert a is not None
        assert b is not None
        assert xa is not None
        dxa = dy @ torch.mul(b, ctx.scaling, out=torch.empty_like(b, dtype=dy.dtype))  # (M, R)
        if need_x:
            dx = lora_linear_grad(dy, dxa, a, ctx.dropout, seed, *stored)
        if need_a:
            assert x is not None
            da = project_grad(dxa, x, ctx.dropout, seed, a.dtype)
        if need_b:
            db = (dy.T @ xa).to(b.dtype, copy=True).mul_(ctx.scaling)
        if need_bias:
            dbias = dy.sum(0)
    return (dx, da, db, None, dbias, None, None, *[None] * len(stored))


lora_linear.register_autograd(lora_backward, setup_context=lora_context)


@operator("nf4_lora_linear_grad", f"(Tensor dy, Tensor dxa, Tensor a, float dropout, Tensor? seed, {Q}) -> Tensor")
def lora_linear_grad(dy: Tensor, dxa: Tensor, a: Tensor, dropout: float, seed: Tensor | None, *stored: Any) -> Tensor:
    q = whole(dy.dtype, stored)
    return form("matmul_grad", dy.device, dy, q)(dy, q, dxa, a, dropout, number(seed))


@lora_linear_grad.register_fake
def _(dy: Tensor, dxa: Tensor, a: Tensor, dropout: float, seed: Tensor | None, *stored: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], stored[5][1])


@operator("project_grad", "(Tensor dxa, Tensor x, float dropout, Tensor? seed, ScalarType dtype) -> Tensor")
def project_grad(dxa: Tensor, x: Tensor, dropout: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
    return form("project_grad", x.device, dxa, x)(dxa, x, dropout, number(seed), dtype)


@project_grad.register_fake
def _(dxa: Tensor, x: Tensor, dropout: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(dxa.shape[1], x.shape[1], dtype=dtype)


def number(seed: Tensor | None) -> int | None:
    """A seed travels as a tensor on the CPU, so that a compiled graph draws a new one each time it runs."""
    return None if seed is None else int(seed)
