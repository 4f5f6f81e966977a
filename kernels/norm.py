"""RMSNorm in Triton: a row is read once, and only x and one number per row are kept for backward.

The gradient of the weight sums over all tokens. Frozen norms never ask for it, so it has a kernel of its own:
each program sums a stripe of rows for some columns, and the sums of the stripes are added up at the end.
M tokens, D features.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.launch import Launch, Shipped

# By the widest row that a program holds at once. Some rows together where they are short.
LAUNCHES: dict[int, Launch] = {
    256: Launch({"ROWS": 8, "BLOCK_D": 256}, num_warps=4),
    1024: Launch({"ROWS": 4, "BLOCK_D": 1024}, num_warps=4),
    2048: Launch({"ROWS": 1, "BLOCK_D": 2048}, num_warps=4),
    4096: Launch({"ROWS": 1, "BLOCK_D": 4096}, num_warps=8),
    8192: Launch({"ROWS": 1, "BLOCK_D": 8192}, num_warps=8),
    16384: Launch({"ROWS": 1, "BLOCK_D": 16384}, num_warps=16),
}
WIDEST = max(LAUNCHES)
WEIGHT_LAUNCH = Launch({"ROWS": 16, "BLOCK_D": 128}, num_warps=4)
STRIPES = 64  # with 32 column blocks of a width of 4096 some thousand programs: enough for any GPU


def accepts(x: Tensor, weight: Tensor) -> bool:
    """Whether these kernels take x: float64 needs wider sums, and a row must fit."""
    return x.dtype != torch.float64 and weight.dtype != torch.float64 and x.shape[-1] <= WIDEST


def rms_norm(
    x: Float[Tensor, "*rows D"], weight: Float[Tensor, " D"], eps: float
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows 1"]]:
    """(..., D) -> (..., D): x / sqrt(mean(x²) + eps) * weight, with the statistics in float32; and 1 / sqrt(...)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    M, D = rstd.numel(), x.shape[-1]
    if x.numel():
        launch = launch_for(D)
        grid = (-(-M // launch.constants["ROWS"]),)
        rms_norm_kernel[grid](x, weight.contiguous(), y, rstd, M, D, eps, **launch.options())
    return y, rstd


def rms_norm_grad(
    dy: Float[Tensor, "*rows D"],
    x: Float[Tensor, "*rows D"],
    weight: Float[Tensor, " D"],
    rstd: Float[Tensor, "*rows 1"],
    need_weight: bool,
) -> tuple[Float[Tensor, "*rows D"], Float[Tensor, " D"] | None]:
    """The gradients of x and, if it is asked for, of the weight."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    M, D = rstd.numel(), x.shape[-1]
    if not x.numel():
        return dx, torch.zeros_like(weight) if need_weight else None
    launch = launch_for(D)
    grid = (-(-M // launch.constants["ROWS"]),)
    rms_norm_grad_kernel[grid](dy, x, weight.contiguous(), rstd, dx, M, D, **launch.options())
    if not need_weight:
        return dx, None

    rows, columns = WEIGHT_LAUNCH.constants["ROWS"], WEIGHT_LAUNCH.constants["BLOCK_D"]
    per_stripe = -(-M // (STRIPES * rows)) * rows
    sums = x.new_empty(-(-M // per_stripe), D, dtype=torch.float32)
    weight_grad_kernel[(-(-D // columns), len(sums))](dy, x, rstd, sums, M, D, per_stripe, **WEIGHT_LAUNCH.options())
    return dx, sums.sum(0).to(weight.dtype)


def launch_for(D: int) -> Launch:
    if D > WIDEST:
        raise ValueError(f"the kernel of the norm holds rows of up to {WIDEST} features; these have {D}")
    return next(launch for width, launch in LAUNCHES.items() if width >= D)


@triton.jit
def rms_norm_kernel(
    x_ptr,  # (M, D)
    weight_ptr,  # (D)
    y_ptr,  # (M, D)
    rstd_ptr,  # (M)
    M,
    D,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    ok = (row < M)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    x = tl.load(x_ptr + at, mask=ok, other=0.0)
    h = x.to(tl.float32)
    rstd = 1 / tl.sqrt(tl.sum(h * h, axis=1) / D + eps)  # (ROWS)
    tl.store(rstd_ptr + row, rstd, mask=row < M)
    # Rounded before the weight comes in, as in the definition.
    h = (h * rstd[:, None]).to(x.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (h * weight[None, :]).to(x.dtype), mask=ok)


@triton.jit
def rms_norm_grad_kernel(
    dy_ptr,  # (M, D)
    x_ptr,  # (M, D)
    weight_ptr,  # (D)
    rstd_ptr,  # (M)
    dx_ptr,  # (M, D)
    M,
    D,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    ok = (row < M)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    x = tl.load(x_ptr + at, mask=ok, other=0.0)
    dy = tl.load(dy_ptr + at, mask=ok, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)[:, None]  # (ROWS, 1)
    h = x.to(tl.float32) * rstd
    g = dy * weight[None, :]
    share = tl.sum(g * h, axis=1)[:, None] / D
    tl.store(dx_ptr + at, (rstd * (g - h * share)).to(x.dtype), mask=ok)


@triton.jit
def weight_grad_kernel(
    dy_ptr,  # (M, D)
    x_ptr,  # (M, D)
    rstd_ptr,  # (M)
    sums_ptr,  # (stripes, D)
    M,
    D,
    per_stripe,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    stripe = tl.program_id(1).to(tl.int64)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, per_stripe, ROWS):
        row = stripe * per_stripe + start + tl.arange(0, ROWS)
        ok = (row < M)[:, None] & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        x = tl.load(x_ptr + at, mask=ok, other=0.0)
        dy = tl.load(dy_ptr + at, mask=ok, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)[:, None]
        acc += (x.to(tl.float32) * rstd).to(x.dtype).to(tl.float32) * dy
    tl.store(sums_ptr + stripe * D + column, tl.sum(acc, axis=0), mask=column < D)


def shipped() -> list[Shipped]:
    kernels = []
    for dtype in ("bf16", "fp16", "fp32"):
        pointers = {f"{name}_ptr": f"*{dtype}" for name in ("x", "weight", "y", "dy", "dx")}
        pointers |= {"rstd_ptr": "*fp32", "sums_ptr": "*fp32"}
        numbers = {"M": "i32", "D": "i32", "eps": "fp32", "per_stripe": "i32"}
        pairs = [(kernel, w) for kernel in (rms_norm_kernel, rms_norm_grad_kernel) for w in LAUNCHES.items()]
        for kernel, (width, launch) in [*pairs, (weight_grad_kernel, (0, WEIGHT_LAUNCH))]:
            name = kernel.fn.__name__.removesuffix("_kernel") + (f" D<={width}" if width else "")
            signature = {n: t for n, t in (pointers | numbers).items() if n in kernel.arg_names}
            aligned = tuple(n for n in signature if n.endswith("_ptr") or n == "D")
            kernels.append(Shipped(f"{name} {dtype}", kernel, signature, launch, aligned))
    return kernels
