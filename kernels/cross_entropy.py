"""Cross-entropy of rows of logits in Triton; in training the logits become their own gradient.

A program reads its row once, keeping the largest logit so far and the sum of exponentials relative to it; that is
the loss. A second reading, which finds the row in the cache, writes softmax minus one-hot over the logits.
L rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from kernels.launch import Launch, Shipped

SMALL = 2048  # a vocabulary that is read at once; a larger one is read in pieces
LAUNCHES = {
    "small": Launch({"BLOCK_V": SMALL}, num_warps=4),
    "any": Launch({"BLOCK_V": 8192}, num_warps=16),
}


def accepts(hidden: Tensor, weight: Tensor) -> bool:
    """Whether this kernel takes logits of this dtype: float64 needs more digits."""
    return hidden.dtype != torch.float64


def cross_entropy(
    logits: Float[Tensor, "L V"], targets: Int[Tensor, " L"], ignore_index: int, gradient: bool
) -> Float[Tensor, " L"]:
    """The loss of each row; with `gradient`, the logits become the gradient of their loss."""
    L, V = logits.shape
    losses = logits.new_empty(L, dtype=torch.float32)
    if logits.stride(1) != 1:
        raise ValueError(f"logits are written in place, so each row lies side by side, not {logits.stride()} apart")
    if L:
        launch = LAUNCHES["small" if V <= SMALL else "any"]
        cross_entropy_kernel[(L,)](
            logits,
            targets.contiguous(),
            losses,
            V,
            logits.stride(0),
            ignore_index,
            **launch.options() | {"GRADIENT": gradient},
        )
    return losses


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # (L, V)
    targets_ptr,  # (L)
    losses_ptr,  # (L)
    V,
    row_stride,
    ignore_index,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    target = tl.load(targets_ptr + row)
    scored = target != ignore_index
    inside = scored & (target >= 0) & (target < V)
    hit = tl.load(row_ptr + target, mask=inside, other=0.0).to(tl.float32)

    top = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        x = tl.load(row_ptr + column, mask=column < V, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, axis=0))
        base = tl.where(new == -float("inf"), 0.0, new)  # -inf so far: nothing to add yet
        total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), axis=0)
        top = new
    lse = top + tl.log(total)
    tl.store(losses_ptr + row, tl.where(scored, lse - hit, 0.0))

    if GRADIENT:
        for start in range(0, V, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            x = tl.load(row_ptr + column, mask=column < V, other=-float("inf"))
            slope = tl.exp(x.to(tl.float32) - lse) - tl.where(column == target, 1.0, 0.0)
            tl.store(row_ptr + column, tl.where(scored, slope, 0.0).to(x.dtype), mask=column < V)


def shipped() -> list[Shipped]:
    kernels = []
    for dtype in ("bf16", "fp16", "fp32"):
        for size, launch in LAUNCHES.items():
            for gradient in (False, True):
                name = f"cross_entropy{' and gradient' if gradient else ''} {size} V {dtype}"
                signature = {"logits_ptr": f"*{dtype}", "targets_ptr": "*i64", "losses_ptr": "*fp32"}
                signature |= {"V": "i32", "row_stride": "i32", "ignore_index": "i32"}
                constants = {**launch.constants, "GRADIENT": gradient}
                aligned = ("logits_ptr", "targets_ptr", "losses_ptr", "V", "row_stride")
                launched = Launch(constants, launch.num_warps, launch.num_stages)
                kernels.append(Shipped(name, cross_entropy_kernel, signature, launched, aligned))
    return kernels
