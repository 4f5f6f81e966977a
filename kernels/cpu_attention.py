"""Causal attention on CPUs that multiply bfloat16, in C: what is handed to `kernels/c/attention.c` and comes back.

torch's own attention takes such CPUs through another library's products, three to seven times slower than the
rest of a block. Axes: B batch, H query heads, K key/value heads, T tokens, C channels per head.
"""

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor

from kernels.cpu import check_memory, loaded, threads
from kernels.cpu_build import View, library
from kernels.layers import like


def accepts(q: Tensor, k: Tensor) -> bool:
    """Is this bfloat16, on a CPU that multiplies it?"""
    fits = q.dtype == k.dtype == torch.bfloat16 and q.shape[-1] % 16 == 0 and q.numel() > 0
    c = library()
    return fits and c is not None and bool(c.attends_in_bf16())


def attention(
    q: BFloat16[Tensor, "B H T C"], k: BFloat16[Tensor, "B K T C"], v: BFloat16[Tensor, "B K T C"]
) -> tuple[BFloat16[Tensor, "B H T C"], Float32[Tensor, "B H T"]]:
    """softmax(q k^T / sqrt(C)) v over the tokens up to each query, and the logarithm of the softmax's sum."""
    B, H, T, C = q.shape
    q, k, v = (dense(t) for t in (q, k, v))
    y, lse = like(q), q.new_empty(B, H, T, dtype=torch.float32)
    failed = loaded().attention(
        view(q), view(k), view(v), view(y), lse.data_ptr(), B, H, k.shape[1], T, C, C**-0.5, threads()
    )
    check_memory(failed)
    return y, lse


def attention_grad(
    dy: BFloat16[Tensor, "B H T C"],
    q: BFloat16[Tensor, "B H T C"],
    k: BFloat16[Tensor, "B K T C"],
    v: BFloat16[Tensor, "B K T C"],
    y: BFloat16[Tensor, "B H T C"],
    lse: Float32[Tensor, "B H T"],
) -> tuple[BFloat16[Tensor, "B H T C"], BFloat16[Tensor, "B K T C"], BFloat16[Tensor, "B K T C"]]:
    """Gradients of q, k and v."""
    B, H, T, C = q.shape
    dy, q, k, v, y = (dense(t) for t in (dy, q, k, v, y))
    dq, dk, dv = (like(t) for t in (q, k, v))
    failed = loaded().attention_grad(
        view(q), view(k), view(v), view(y), lse.data_ptr(), view(dy), view(dq), view(dk), view(dv),
        B, H, k.shape[1], T, C, C**-0.5, threads(),
    )  # fmt: skip
    check_memory(failed)
    return dq, dk, dv


def dense(t: Tensor) -> Tensor:
    """t as C can read it: channels side by side, and pairs of them at addresses that are multiples of 4."""
    fits = t.stride(-1) == 1 and all(stride % 2 == 0 for stride in t.stride()[:-1]) and t.data_ptr() % 4 == 0
    return t if fits else t.contiguous()


def view(t: Tensor) -> View:
    return View(t.data_ptr(), *t.stride()[:3])
