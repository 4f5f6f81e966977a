"""Causal attention: torch's own but for bfloat16 on a CPU, where it is slow and an operator of ours takes its place.

The operator's backward keeps q, k, v, the result and the logarithm of each softmax's sum, never the scores.
Axes: B batch, H query heads, K key/value heads, T tokens, C channels per head.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import reference
from kernels.dispatch import form
from kernels.layers import like
from kernels.operator import operator
from kernels.planned import kind_of
from kernels.reference import check_attention


def attention(q: Float[Tensor, "..."], k: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """(B, H, T, C) -> (B, H, T, C): softmax(q k^T / sqrt(C)) v over the tokens up to each query.

    k and v are (B, K, T, C): every H / K query heads share one of keys and values.
    """
    check_attention(q, k, v)
    if kind_of(q.device) == "cpu" and q.dtype == k.dtype == v.dtype == torch.bfloat16:
        return attention_op(q, k, v)[0]
    return reference.attention(q, k, v)


@operator("attention", "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
def attention_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return form("attention", q.device, q, k)(q, k, v)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


@once_differentiable
def attention_backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor]:
    return attention_grad_op(dy, *ctx.saved_tensors)


attention_op.register_autograd(attention_backward, setup_context=attention_context)


@operator(
    "attention_grad", "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse) -> (Tensor, Tensor, Tensor)"
)
def attention_grad_op(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return form("attention_grad", q.device, q, k)(dy, q, k, v, y, lse)


@attention_grad_op.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return like(q), like(k), like(v)
