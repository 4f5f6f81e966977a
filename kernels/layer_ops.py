"""The layers around the products as operators that torch knows: with gradients, and opaque to `torch.compile`.

Each is one pass over memory on a GPU and a few on a CPU, and keeps for backward little more than what came in.
The gradients are of the first order: none of these can be differentiated twice, but for `rotate`.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import chunked
from kernels.dispatch import form
from kernels.operator import operator
from kernels.reference import (
    check_cross_entropy,
    check_gate,
    check_norm,
    check_rotation,
    wide,
)


def rms_norm(x: Float[Tensor, "..."], weight: Float[Tensor, "..."], eps: float) -> Float[Tensor, "..."]:
    """(..., D) -> (..., D): x / sqrt(mean(x²) + eps) * weight, with the statistics in float32."""
    check_norm(x, weight)
    return norm_op(x, weight, eps)[0]


def rotate(x: Float[Tensor, "..."], cos: Float[Tensor, "..."], sin: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """(B, H, T, C) -> (B, H, T, C): turn each pair of channels (c, c + C/2) by its angle, in float32.

    cos and sin are (B, 1, T, C/2), or have 1 for B. They are constants: no gradient flows to them.
    """
    check_rotation(x, cos, sin)
    return rotate_op(x, cos.detach(), sin.detach(), False)


def swiglu(gate: Float[Tensor, "..."], up: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """silu(gate) * up, entry by entry, where silu(g) = g / (1 + exp(-g))."""
    check_gate(gate, up)
    return swiglu_op(gate, up)


def linear_cross_entropy(
    hidden: Float[Tensor, "..."],
    weight: Float[Tensor, "..."],
    targets: Int[Tensor, "..."],
    ignore_index: int = -100,
    *,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """Cross-entropy of each target, in nats and float32, under the logits hidden weight^T.

    hidden is (L, D), weight (V, D), targets (L). Targets equal to `ignore_index` are not scored. "mean" is over those
    that are (NaN if none is); "none" gives the loss of each target, 0 where it is not scored, and has no gradient here.
    """
    check_cross_entropy(hidden, weight, targets, reduction)
    grad = torch.is_grad_enabled()
    need_hidden, need_weight = grad and hidden.requires_grad, grad and weight.requires_grad
    if reduction == "none":
        if need_hidden or need_weight:
            raise ValueError(
                'reduction="none" is for evaluation and has no gradient; call it under torch.no_grad(), '
                'or ask for "mean"'
            )
        return cross_entropy_op(hidden, weight, targets, ignore_index, False, False)[0]
    _, total, _, _ = cross_entropy_op(hidden, weight, targets, ignore_index, need_hidden, need_weight)
    count = (targets != ignore_index).sum()
    return torch.where(count > 0, total / count.clamp_min(1), torch.nan)


def none_as_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An operator gives tensors: what was not asked for is one of no entries."""
    return like.new_empty(0) if tensor is None else tensor


# RMSNorm


@operator("rms_norm", "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
def norm_op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return form("rms_norm", x.device, x, weight)(x, weight, eps)


@norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide(x.dtype))


def norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


@once_differentiable
def norm_backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    need_x, need_weight, _ = ctx.needs_input_grad
    dx, dweight = norm_grad_op(dy, *ctx.saved_tensors, need_weight)
    return dx if need_x else None, dweight if need_weight else None, None


norm_op.register_autograd(norm_backward, setup_context=norm_context)


@operator("rms_norm_grad", "(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool need_weight) -> (Tensor, Tensor)")
def norm_grad_op(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_weight: bool) -> tuple[Tensor, Tensor]:
    dx, dweight = form("rms_norm_grad", x.device, x, weight)(dy, x, weight, rstd, need_weight)
    return dx, none_as_empty(dweight, weight)


@norm_grad_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, need_weight: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if need_weight else 0)


# Rotary positions


@operator("rotate", "(Tensor x, Tensor cos, Tensor sin, bool backwards) -> Tensor")
def rotate_op(x: Tensor, cos: Tensor, sin: Tensor, backwards: bool) -> Tensor:
    return form("rotate", x.device, x, cos)(side_by_side(x), cos, sin, backwards)


@rotate_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, backwards: bool) -> Tensor:
    return torch.empty_like(side_by_side(x))


def side_by_side(x: Tensor) -> Tensor:
    """x, or a copy of it whose channels are neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rotate_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.backwards = inputs
    ctx.save_for_backward(cos, sin)


def rotate_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return rotate_op(dy, cos, sin, not ctx.backwards), None, None, None


rotate_op.register_autograd(rotate_backward, setup_context=rotate_context)


# SwiGLU


@operator("swiglu", "(Tensor gate, Tensor up) -> Tensor")
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    return form("swiglu", gate.device, gate, up)(gate, up)


@swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def swiglu_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@once_differentiable
def swiglu_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    return swiglu_grad_op(dy, *ctx.saved_tensors)


swiglu_op.register_autograd(swiglu_backward, setup_context=swiglu_context)


@operator("swiglu_grad", "(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)")
def swiglu_grad_op(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return form("swiglu_grad", gate.device, gate, up)(dy, gate, up)


@swiglu_grad_op.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


# Cross-entropy of a linear layer's logits


@operator(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, bool need_hidden, bool need_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def cross_entropy_op(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses, their sum, and the gradients of the sum, which forward makes while the logits are there."""
    rows = form("cross_entropy", hidden.device, hidden, weight)
    losses, dhidden, dweight = chunked.linear_cross_entropy(
        hidden, weight, targets, ignore_index, need_hidden, need_weight, rows
    )
    return losses, losses.sum(), none_as_empty(dhidden, hidden), none_as_empty(dweight, losses)


@cross_entropy_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[0], dtype=wide(hidden.dtype))
    dhidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    return losses, losses.new_empty(()), dhidden, losses.new_empty(weight.shape if need_weight else 0)


def cross_entropy_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    losses, _, dhidden, dweight = output
    ctx.mark_non_differentiable(losses, dhidden, dweight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden, dweight)
    ctx.dtype = inputs[1].dtype


@once_differentiable
def cross_entropy_backward(ctx: Any, _: Any, dtotal: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
    dhidden, dweight = ctx.saved_tensors
    need_hidden, need_weight, *_ = ctx.needs_input_grad
    given = dtotal is not None
    dx = scaled(dhidden, dtotal, dhidden.dtype) if need_hidden and given else None
    dw = scaled(dweight, dtotal, ctx.dtype) if need_weight and given else None
    return dx, dw, None, None, None, None


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient times a number, in float32: in 16 bits the factor itself would be off by half a percent."""
    return (gradient.to(factor.dtype) * factor).to(dtype)


cross_entropy_op.register_autograd(cross_entropy_backward, setup_context=cross_entropy_context)
