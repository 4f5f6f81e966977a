"""The layers around the products in plain torch, with gradients by hand: the form for CPUs, and for any device.

What autograd would keep of them is several times what goes through: float32 copies, squares, silu(gate). Here
backward gets what came in and computes the rest again, with as few passes over memory as plain torch allows.
Each has a gradient that takes the gradient of the output first.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.reference import wide


def rms_norm(
    x: Float[Tensor, "*rows D"], weight: Float[Tensor, " D"], eps: float
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows 1"]]:
    """(..., D) -> (..., D): x / sqrt(mean(x²) + eps) * weight, with the statistics in float32; and 1 / sqrt(...)."""
    h = x.to(wide(x.dtype), copy=True, memory_format=torch.contiguous_format)
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)  # one pass; the mean of h² would write h² first
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return h.mul_(rstd).to(x.dtype).mul_(weight), rstd


def rms_norm_grad(
    dy: Float[Tensor, "*rows D"],
    x: Float[Tensor, "*rows D"],
    weight: Float[Tensor, " D"],
    rstd: Float[Tensor, "*rows 1"],
    need_weight: bool,
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, " D"] | None]:
    """The gradients of x and, if it is asked for, of the weight."""
    D, dtype = x.shape[-1], wide(x.dtype)
    h = x.to(dtype)
    g = dy.to(dtype, copy=True, memory_format=torch.contiguous_format)
    dweight = None
    if need_weight:
        dweight = ((h * rstd).to(x.dtype) * g).reshape(-1, D).sum(0).to(weight.dtype)
    # With h = x rstd and g = dy weight: dx = rstd (g - h mean(g h)).
    g.mul_(weight)
    share = torch.linalg.vecdot(g, h).unsqueeze_(-1).mul_(rstd.pow(3)).div_(-D)
    return g.mul_(rstd).addcmul_(h, share).to(x.dtype), dweight


def rotate(
    x: Float[Tensor, "B H T C"],
    cos: Float[Tensor, "b 1 T half"],
    sin: Float[Tensor, "b 1 T half"],
    backwards: bool = False,
) -> Float[Tensor, "B H T C"]:
    """(B, H, T, C) -> (B, H, T, C): turn each pair of channels (c, c + C/2) by its angle, in float32.

    `backwards` turns by minus the angle: the inverse, and the gradient.
    """
    turned = x.to(wide(x.dtype), copy=True)
    first, second = turned.chunk(2, dim=-1)
    to_second, to_first = first * sin, second * sin
    if backwards:
        first.mul_(cos).add_(to_first)
        second.mul_(cos).sub_(to_second)
    else:
        first.mul_(cos).sub_(to_first)
        second.mul_(cos).add_(to_second)
    return turned.to(x.dtype)


def swiglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """silu(gate) * up, entry by entry, where silu(g) = g / (1 + exp(-g))."""
    return F.silu(gate.contiguous()).mul_(up)


def swiglu_grad(
    dy: Float[Tensor, "*shape"], gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """The gradients of gate and up."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate = dy * up
    torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    return dgate, F.silu(gate).mul_(dy)


def attention(
    q: Float[Tensor, "B H T C"], k: Float[Tensor, "B K T C"], v: Float[Tensor, "B K T C"]
) -> tuple[Float[Tensor, "B H T C"], Float[Tensor, "B H T"]]:
    """softmax(q k^T / sqrt(C)) v over the tokens up to each query; the second result is for other forms."""
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return like(q).copy_(y), q.new_zeros(q.shape[:3], dtype=torch.float32)


def attention_grad(
    dy: Float[Tensor, "B H T C"],
    q: Float[Tensor, "B H T C"],
    k: Float[Tensor, "B K T C"],
    v: Float[Tensor, "B K T C"],
    y: Float[Tensor, "B H T C"],
    lse: Float[Tensor, "B H T"],
) -> tuple[Float[Tensor, "B H T C"], Float[Tensor, "B K T C"], Float[Tensor, "B K T C"]]:
    """Gradients of q, k and v: in float32, one group of heads after the other, since this holds their scores."""
    dq, dk, dv = like(q), like(k), like(v)
    (B, H, T, C), K, dtype = q.shape, k.shape[1], wide(q.dtype)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    for b in range(B):
        for head in range(K):
            group = slice(head * (H // K), (head + 1) * (H // K))
            query, g = q[b, group].to(dtype), dy[b, group].to(dtype)  # (H / K, T, C)
            key, value = k[b, head].to(dtype), v[b, head].to(dtype)  # (T, C)
            p = (query @ key.T * C**-0.5).masked_fill_(future, -torch.inf).softmax(dim=-1)  # (H / K, T, T)
            change = g @ value.T
            change = p * (change - (change * p).sum(dim=-1, keepdim=True)) * C**-0.5
            dq[b, group] = (change @ key).to(q.dtype)
            dk[b, head] = (change.mT @ query).sum(0).to(q.dtype)
            dv[b, head] = (p.mT @ g).sum(0).to(q.dtype)
    return dq, dk, dv


def like(t: Float[Tensor, "B H T C"]) -> Float[Tensor, "B H T C"]:
    """Memory for a tensor of t's shape, in which a token's heads lie side by side, as the next layer reads them."""
    B, H, T, C = t.shape
    return t.new_empty(B, T, H, C).transpose(1, 2)
