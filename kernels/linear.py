"""Linear layers on a stored weight that never keep the weight itself.

Plain autograd would hold the dequantized W of every layer until its backward pass: the whole model in 16
bit. Here forward saves only what is stored anyway, and backward dequantizes W again. With a LoRA branch it
also keeps x and the small drop(x) A^T; of dropout it keeps the seed, from which the mask is drawn again.
M tokens, N outputs, K inputs, R rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import form
from kernels.reference import cast, check_linear, check_lora, drop, dropout_mask, dropout_seed, thinned
from nf4 import QuantizedTensor


def nf4_linear(
    x: Float[Tensor, "..."], q: QuantizedTensor, bias: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """(..., K) -> (..., N): y = x W^T + bias, where W = dequantize(q) is (N, K)."""
    check_linear(x, q, bias)
    return Linear.apply(x, q, cast(bias, x.dtype))


def nf4_lora_linear(
    x: Float[Tensor, "..."],
    q: QuantizedTensor,
    lora_a: Float[Tensor, "..."],
    lora_b: Float[Tensor, "..."],
    scaling: float,
    bias: Float[Tensor, "..."] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Float[Tensor, "..."]:
    """(..., K) -> (..., N): y = x W^T + bias + scaling (drop(x) A^T) B^T, where W = dequantize(q) is (N, K).

    The branch multiplies in x's dtype, whatever dtype the adapter is kept in. Dropout falls on the branch's
    input alone; the base layer sees all of x.
    """
    check_lora(x, q, lora_a, lora_b, dropout, bias)
    if dropout and seed is None:
        seed = dropout_seed()
    return LoraLinear.apply(x, q, lora_a, lora_b, scaling, cast(bias, x.dtype), dropout, seed)


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, q: QuantizedTensor, bias: Tensor | None) -> Tensor:
        ctx.q = q
        return F.linear(x, weight_of(q, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (dy,) = grad_outputs
        dx = dy @ weight_of(ctx.q, dy.dtype) if ctx.needs_input_grad[0] else None
        dbias = rows(dy).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias


class LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        q: QuantizedTensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        bias: Tensor | None,
        dropout: float,
        seed: int | None,
    ) -> Tensor:
        y = F.linear(x, weight_of(q, x.dtype), bias)
        dropped = drop(x, dropout, seed) if seed is not None and dropout else x
        inner = F.linear(dropped, lora_a.to(x.dtype))  # (..., R)
        rows(y).addmm_(rows(inner) * scaling, lora_b.to(x.dtype).T)
        ctx.q, ctx.scaling, ctx.dropout, ctx.seed = q, scaling, dropout, seed
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, lora_a, lora_b, inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (dy,) = grad_outputs
        x, lora_a, lora_b, inner = ctx.saved_tensors
        need_x, _, need_a, need_b, _, need_bias, _, _ = ctx.needs_input_grad
        dx = da = db = None

        dinner = (dy @ lora_b.to(dy.dtype)) * ctx.scaling  # (..., R)
        mask = None
        if ctx.dropout:
            mask = dropout_mask(dy.shape[:-1] + lora_a.shape[1:], ctx.dropout, ctx.seed, dy.device)
        if need_b:
            db = (rows(dy).T @ (rows(inner) * ctx.scaling)).to(lora_b.dtype)
        if need_a:
            dropped = x if mask is None else thinned(x, mask, ctx.dropout)
            da = (rows(dinner).T @ rows(dropped)).to(lora_a.dtype)
        if need_x:
            dx = dinner @ lora_a.to(dy.dtype)
            if mask is not None:  # the mask and the factor of forward, now on the gradient
                dx = thinned(dx, mask, ctx.dropout)
            rows(dx).addmm_(rows(dy), weight_of(ctx.q, dy.dtype))
        dbias = rows(dy).sum(0) if need_bias else None
        return dx, None, da, db, None, dbias, None, None


def weight_of(q: QuantizedTensor, dtype: torch.dtype) -> Float[Tensor, "N K"]:
    return form("dequantize", q.device)(q, dtype)


def rows(x: Tensor) -> Tensor:
    """(..., C) -> (M, C), for sums over all tokens."""
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_zeros(0, x.shape[-1])
