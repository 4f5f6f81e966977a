"""Rotary positions in Triton: each pair of channels turns by an angle, in one pass over memory.

The heads of a token share its angles, so a program takes one token and some of its heads. x may be any view whose
channels lie side by side: queries and keys as they come out of their projection need no copy.
B batch, H heads, T tokens, C channels per head.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.launch import Launch, Shipped

# By the number of channel pairs, C/2.
LAUNCHES: dict[int, Launch] = {
    32: Launch({"HEADS": 32, "BLOCK_C": 32}, num_warps=2),
    64: Launch({"HEADS": 32, "BLOCK_C": 64}, num_warps=4),
    128: Launch({"HEADS": 16, "BLOCK_C": 128}, num_warps=4),
    256: Launch({"HEADS": 8, "BLOCK_C": 256}, num_warps=4),
}
WIDEST = 2 * max(LAUNCHES)


def accepts(x: Tensor, cos: Tensor) -> bool:
    """Whether this kernel takes x: float64 needs more digits, and a head must fit."""
    return x.dtype != torch.float64 and x.shape[-1] <= WIDEST


def rotate(
    x: Float[Tensor, "B H T C"],
    cos: Float[Tensor, "b 1 T half"],
    sin: Float[Tensor, "b 1 T half"],
    backwards: bool = False,
) -> Float[Tensor, "B H T C"]:
    """(B, H, T, C) -> (B, H, T, C): turn each pair of channels (c, c + C/2) by its angle, in float32.

    `backwards` turns by minus the angle: the inverse, and the gradient.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    B, H, T, C = x.shape
    if C > WIDEST:
        raise ValueError(f"the kernel turns heads of up to {WIDEST} channels; these have {C}")
    cos, sin = cos.contiguous().expand(B, -1, -1, -1), sin.contiguous().expand(B, -1, -1, -1)
    y = torch.empty_like(x)
    if x.numel():
        launch = next(launch for pairs, launch in LAUNCHES.items() if 2 * pairs >= C)
        grid = (B * T, triton.cdiv(H, launch.constants["HEADS"]))
        rotate_kernel[grid](
            x,
            cos,
            sin,
            y,
            H,
            T,
            C // 2,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            y.stride(0),
            y.stride(1),
            y.stride(2),
            cos.stride(0),
            **launch.options() | {"BACKWARDS": backwards},
        )
    return y


@triton.jit
def rotate_kernel(
    x_ptr,  # (B, H, T, C)
    cos_ptr,  # (B, 1, T, C/2)
    sin_ptr,  # (B, 1, T, C/2)
    y_ptr,  # (B, H, T, C)
    H,
    T,
    PAIRS,
    x_batch,
    x_head,
    x_token,
    y_batch,
    y_head,
    y_token,
    table_batch,
    BACKWARDS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = (tl.program_id(0) // T).to(tl.int64)
    token = (tl.program_id(0) % T).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    table = batch * table_batch + token * PAIRS + channel
    cos = tl.load(cos_ptr + table, mask=channel < PAIRS, other=0.0).to(tl.float32)  # (1, BLOCK_C)
    sin = tl.load(sin_ptr + table, mask=channel < PAIRS, other=0.0).to(tl.float32)
    if BACKWARDS:
        sin = -sin

    ok = (head < H) & (channel < PAIRS)
    x_at = x_ptr + batch * x_batch + head * x_head + token * x_token + channel
    first = tl.load(x_at, mask=ok, other=0.0).to(tl.float32)  # (HEADS, BLOCK_C)
    second = tl.load(x_at + PAIRS, mask=ok, other=0.0).to(tl.float32)
    y_at = y_ptr + batch * y_batch + head * y_head + token * y_token + channel
    tl.store(y_at, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=ok)
    tl.store(y_at + PAIRS, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=ok)


def shipped() -> list[Shipped]:
    kernels = []
    for dtype in ("bf16", "fp16", "fp32"):
        numbers = [
            n for n in rotate_kernel.arg_names if n in ("H", "T", "PAIRS") or n.endswith(("_batch", "_head", "_token"))
        ]
        signature = {"x_ptr": f"*{dtype}", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "y_ptr": f"*{dtype}"}
        signature |= dict.fromkeys(numbers, "i32")
        aligned = tuple(n for n in signature if n not in ("H", "T"))
        for pairs, launch in LAUNCHES.items():
            for backwards in (False, True):
                name = f"rotate{' backwards' if backwards else ''} C<={2 * pairs} {dtype}"
                constants = {**launch.constants, "BACKWARDS": backwards}
                launched = Launch(constants, launch.num_warps, launch.num_stages)
                kernels.append(Shipped(name, rotate_kernel, signature, launched, aligned))
    return kernels
