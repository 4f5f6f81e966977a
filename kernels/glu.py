"""SwiGLU in Triton: silu(gate) * up in one pass, and in backward both gradients in one pass.

Plain autograd keeps silu(gate) beside gate and up, a third of the widest tensors in a block. Here it is computed
again.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.launch import Launch, Shipped

LAUNCH = Launch({"BLOCK": 1024}, num_warps=4)  # 8 entries a thread: one load of 16 bytes


def accepts(gate: Tensor, up: Tensor) -> bool:
    """Whether these kernels take gate and up: float64 needs more digits."""
    return gate.dtype != torch.float64


def swiglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """silu(gate) * up, entry by entry, where silu(g) = g / (1 + exp(-g))."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    if y.numel():
        swiglu_kernel[grid_of(y)](gate, up, y, y.numel(), **LAUNCH.options())
    return y


def swiglu_grad(
    dy: Float[Tensor, "*shape"], gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """The gradients of gate and up."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if dy.numel():
        swiglu_grad_kernel[grid_of(dy)](dy, gate, up, dgate, dup, dy.numel(), **LAUNCH.options())
    return dgate, dup


def grid_of(x: Tensor) -> tuple[int]:
    return (-(-x.numel() // LAUNCH.constants["BLOCK"]),)


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, y_ptr, count, BLOCK: tl.constexpr):  # all (count)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < count
    gate = tl.load(gate_ptr + at, mask=ok, other=0.0)
    up = tl.load(up_ptr + at, mask=ok, other=0.0).to(tl.float32)
    g = gate.to(tl.float32)
    silu = (g / (1 + tl.exp(-g))).to(gate.dtype).to(tl.float32)  # rounded before the product, as in the definition
    tl.store(y_ptr + at, (silu * up).to(gate.dtype), mask=ok)


@triton.jit
def swiglu_grad_kernel(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, count, BLOCK: tl.constexpr):  # all (count)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < count
    dy = tl.load(dy_ptr + at, mask=ok, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=ok, other=0.0)
    up = tl.load(up_ptr + at, mask=ok, other=0.0).to(tl.float32)
    g = gate.to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    slope = sigmoid * (1 + g * (1 - sigmoid))
    tl.store(dgate_ptr + at, (dy * up * slope).to(gate.dtype), mask=ok)
    tl.store(dup_ptr + at, (dy * g * sigmoid).to(gate.dtype), mask=ok)


def shipped() -> list[Shipped]:
    kernels = []
    for dtype in ("bf16", "fp16", "fp32"):
        for kernel in (swiglu_kernel, swiglu_grad_kernel):
            signature = {n: f"*{dtype}" for n in kernel.arg_names if n.endswith("_ptr")} | {"count": "i32"}
            name = kernel.fn.__name__.removesuffix("_kernel")
            kernels.append(Shipped(f"{name} {dtype}", kernel, signature, LAUNCH, tuple(signature)))
    return kernels
