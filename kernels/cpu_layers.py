"""The layers around the products on a CPU, in C: what is handed to `kernels/c/layers.c` and comes back.

In plain torch each is four to eight passes over memory; here one.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.cpu import DTYPES, loaded, threads
from kernels.cpu_build import library


def accepts(first: Tensor, second: Tensor) -> bool:
    """Is this a dtype that C computes in, and entries that are there?"""
    return library() is not None and first.dtype in DTYPES and first.numel() > 0


def accepts_norm(x: Tensor, weight: Tensor) -> bool:
    """The same, with a weight of x's dtype."""
    return accepts(x, weight) and weight.dtype == x.dtype


def rms_norm(
    x: Float[Tensor, "*rows D"], weight: Float[Tensor, " D"], eps: float
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows 1"]]:
    """(..., D) -> (..., D): x / sqrt(mean(x²) + eps) * weight, with the statistics in float32; and 1 / sqrt(...)."""
    x, weight, D = x.contiguous(), weight.contiguous(), x.shape[-1]
    y, rstd = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    loaded().rms_norm(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), rstd.data_ptr(), x.numel() // D, D, eps,
        DTYPES[x.dtype], threads(),
    )  # fmt: skip
    return y, rstd


def rms_norm_grad(
    dy: Float[Tensor, "*rows D"],
    x: Float[Tensor, "*rows D"],
    weight: Float[Tensor, " D"],
    rstd: Float[Tensor, "*rows 1"],
    need_weight: bool,
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, " D"] | None]:
    """The gradients of x and, if it is asked for, of the weight."""
    dy, x, weight, D = dy.contiguous(), x.contiguous(), weight.contiguous(), x.shape[-1]
    dx = torch.empty_like(x)
    loaded().rms_norm_grad(
        dy.data_ptr(), x.data_ptr(), weight.data_ptr(), rstd.data_ptr(), dx.data_ptr(), x.numel() // D, D,
        DTYPES[x.dtype], threads(),
    )  # fmt: skip
    dweight = None
    if need_weight:
        dweight = ((x * rstd).to(x.dtype).float() * dy).reshape(-1, D).sum(0).to(weight.dtype)
    return dx, dweight


def rotate(
    x: Float[Tensor, "B H T C"],
    cos: Float[Tensor, "b 1 T half"],
    sin: Float[Tensor, "b 1 T half"],
    backwards: bool = False,
) -> Float[Tensor, "B H T C"]:
    """(B, H, T, C) -> (B, H, T, C): turn each pair of channels (c, c + C/2) by its angle, in float32.

    `backwards` turns by minus the angle: the inverse, and the gradient.
    """
    B, H, T, C = x.shape
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    y = torch.empty_like(x)
    strides = [torch.tensor(t.stride()) for t in (x, y)]
    loaded().rotate(
        x.data_ptr(), strides[0].data_ptr(), y.data_ptr(), strides[1].data_ptr(), cos.data_ptr(), sin.data_ptr(),
        0 if cos.shape[0] == 1 else T * (C // 2), -1.0 if backwards else 1.0, B, H, T, C, DTYPES[x.dtype], threads(),
    )  # fmt: skip
    return y


def swiglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """silu(gate) * up, entry by entry, where silu(g) = g / (1 + exp(-g))."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    loaded().swiglu(gate.data_ptr(), up.data_ptr(), y.data_ptr(), y.numel(), DTYPES[y.dtype], threads())
    return y


def swiglu_grad(
    dy: Float[Tensor, "*shape"], gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """The gradients of gate and up."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    loaded().swiglu_grad(
        *(t.data_ptr() for t in (dy, gate, up, dgate, dup)), gate.numel(), DTYPES[gate.dtype], threads()
    )
    return dgate, dup


def rows_cross_entropy(
    logits: Float[Tensor, "L V"], targets: Int[Tensor, " L"], ignore_index: int, gradient: bool
) -> Float[Tensor, " L"]:
    """The loss of each row; with `gradient`, the logits become the gradient of their loss."""
    L, V = logits.shape
    index = torch.where(targets == ignore_index, -1, targets.long()).contiguous()
    losses = logits.new_empty(L, dtype=torch.float32)
    loaded().cross_entropy(
        logits.data_ptr(), index.data_ptr(), losses.data_ptr(), L, V, int(gradient), DTYPES[logits.dtype], threads()
    )
    return losses
