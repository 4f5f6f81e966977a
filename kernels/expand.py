"""The products with many tokens on a GPU: the LoRA branch is written first, and the dense product is added to it.

The branch's second product takes R numbers to a row of many: what takes time is writing it once. So it is written where
the result is to stand, scaled, with the bias in forward and thinned by dropout in backward; then one dense product on
the decoded weight adds to it as it stores its own. Done one after the other with torch's functions, casting, scaling,
multiplying, dropping and adding would be five launches in place of one, and as many passes over memory.
M tokens, N outputs, K inputs, C columns of the result, R rank.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kernels.dense import decoded
from kernels.dropout import DTYPES, dropping, kept
from kernels.launch import Launch, Shipped, ceil_div
from kernels.reference import cast
from nf4 import QuantizedTensor

# On an H200, 4096 x 4096 at rank 16: 11.5 us, and 25.3 with dropout; 64 x 128 with 4 warps takes 12.2 and 24.6.
LAUNCH = Launch({"BM": 64, "BC": 64}, num_warps=4, num_stages=1)
RANKS = (16, 32, 64)  # widths of the rank's tile; a higher rank takes several


def accepts(x: Float[Tensor, "M K"], q: QuantizedTensor) -> bool:
    """Whether these forms multiply x: of any type a model computes in."""
    return x.dtype in DTYPES


def matmul(
    x: Float[Tensor, "M K"],
    q: QuantizedTensor,
    bias: Float[Tensor, " N"] | None = None,
    xa: Float[Tensor, "M R"] | None = None,
    lora_b: Float[Tensor, "N R"] | None = None,
    scaling: float = 1.0,
) -> Float[Tensor, "M N"]:
    """(M, K) -> (M, N): y = x W^T + bias + scaling xa B^T, where W = dequantize(q) is (N, K)."""
    W = decoded(q, x.dtype)
    if xa is None or lora_b is None:
        return F.linear(x, W, cast(bias, x.dtype))
    return expand(xa, lora_b.T, scaling, bias).addmm_(x, W.T)


def matmul_grad(
    dy: Float[Tensor, "M N"],
    q: QuantizedTensor,
    dxa: Float[Tensor, "M R"] | None = None,
    lora_a: Float[Tensor, "R K"] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Float[Tensor, "M K"]:
    """(M, N) -> (M, K): dx = dy W + drop(dxa A), with the mask that forward put on x."""
    W = decoded(q, dy.dtype)
    if dxa is None or lora_a is None:
        return dy @ W
    return expand(dxa, lora_a, 1.0, None, dropout, seed).addmm_(dy, W)


def expand(
    inner: Float[Tensor, "M R"],
    outer: Float[Tensor, "R C"],
    scaling: float = 1.0,
    bias: Float[Tensor, " C"] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Float[Tensor, "M C"]:
    """(M, R), (R, C) -> (M, C): drop(scaling inner outer) + bias, multiplied in inner's dtype."""
    (M, R), C = inner.shape, outer.shape[1]
    out = torch.empty(M, C, dtype=inner.dtype, device=inner.device)
    BM, BC = LAUNCH.constants["BM"], LAUNCH.constants["BC"]
    seed, threshold, factor, drops = dropping(dropout, seed)
    if out.numel():
        expand_kernel[ceil_div(C, BC), ceil_div(M, BM)](
            inner.contiguous(),
            outer,
            inner if bias is None else bias.contiguous(),
            out,
            M,
            C,
            R,
            outer.stride(0),
            outer.stride(1),
            float(scaling * factor),
            seed,
            threshold,
            **LAUNCH.options(BIAS=bias is not None, DROP=drops, EIGHTS=C % 8 == 0, BR=rank_tile(R)),
        )
    return out


@triton.jit(do_not_specialize=["seed", "threshold", "M"])
def expand_kernel(
    inner_ptr,  # (M, R)
    outer_ptr,  # (R, C), its entries row_stride and column_stride apart
    bias_ptr,  # (C,)
    out_ptr,  # (M, C)
    M,
    C,
    R,
    row_stride,
    column_stride,
    scaling,
    seed,
    threshold,
    BIAS: tl.constexpr,
    DROP: tl.constexpr,
    EIGHTS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
):
    """(BM, BC) of the result."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    first = tl.program_id(0) * BC
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    c = first + tl.arange(0, BC)
    acc = tl.zeros((BM, BC), tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        inner = tl.load(
            inner_ptr + m.to(tl.int64)[:, None] * R + r[None, :], mask=(m[:, None] < M) & (r[None, :] < R), other=0.0
        )
        at = outer_ptr + r.to(tl.int64)[:, None] * row_stride + c.to(tl.int64)[None, :] * column_stride
        outer = tl.load(at, mask=(r[:, None] < R) & (c[None, :] < C), other=0.0)
        acc = tl.dot(inner, outer.to(DTYPE), acc, input_precision="ieee")
    acc = acc * scaling
    if DROP:
        acc = tl.where(kept(seed, threshold, m, first, C, BC, EIGHTS), acc, 0.0)
    if BIAS:
        acc += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(DTYPE).to(tl.float32)[None, :]
    at = out_ptr + m.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(at, acc.to(DTYPE), mask=(m[:, None] < M) & (c[None, :] < C))


def rank_tile(R: int) -> int:
    return next((width for width in RANKS if width >= R), RANKS[-1])


def shipped() -> list[Shipped]:
    """What may be launched on real activations, with an adapter in float32: forward with a bias, backward."""
    signature = {
        "inner_ptr": "*bf16",
        "outer_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "out_ptr": "*bf16",
        **dict.fromkeys(("M", "C", "R", "row_stride", "column_stride", "threshold"), "i32"),
        "scaling": "fp32",
        "seed": "i64",
    }
    return [
        Shipped(
            name=f"expand{', dropout' if drops else ', bias'}, rank {BR}",
            kernel=expand_kernel,
            signature=signature,
            launch=replace(
                LAUNCH,
                constants={**LAUNCH.constants, "BIAS": not drops, "DROP": drops, "EIGHTS": True, "BR": BR},
            ),
            aligned=(
                "inner_ptr",
                "outer_ptr",
                "bias_ptr",
                "out_ptr",
                "C",
                "R",
                "row_stride" if drops else "column_stride",
            ),
        )
        for drops in (False, True)
        for BR in RANKS
    ]
