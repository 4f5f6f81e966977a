"""DoRA: the length of each row of the merged weight is a parameter of its own, and LoRA turns only its direction.

    y = m / |W + s B A| * (W x + s B A drop(x)) + bias

|.| is the length of each row and counts as a constant in backward (Liu et al. 2024, section 4.3); m starts as that
length, so that at the start the layer does what its base does. Over a quantized weight the length comes from

    |W + s B A|² = |W|² + 2 s (W Aᵀ · B) + s² (B A Aᵀ · B)

where · sums a row's products. |W|² never changes and W Aᵀ is a product like any other, so no dense weight is made.
Where the three terms nearly cancel, rounding is all that is left of them: the caller is told which rows these are.

Letters: M tokens, N outputs, K inputs, R rank.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kernels.operator import operator

CHUNK_ROWS = 1024  # rows made dense at a time; large enough for a product, small beside the weight
# The float32 product W Aᵀ is good to about 1e-6 of the terms: below this share of them, a row's square is better
# computed from the row itself, and above it the length is good to 1e-4.
DOUBTFUL = 1e-2
ROUNDING = 1e-6


def rescaled(
    product: Float[Tensor, "*rows N"],
    magnitude: Float[Tensor, " N"],
    length: Float[Tensor, " N"],
    bias: Float[Tensor, " N"] | None = None,
) -> Float[Tensor, "*rows N"]:
    """magnitude / length * product + bias, computed in float32 and rounded once to the product's dtype."""
    return rescale(product, ratio(magnitude, length), bias)


def ratio(magnitude: Float[Tensor, " N"], length: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """magnitude / length, and 0 for a row of zeros, which has no direction."""
    return torch.where(length > 0, magnitude / torch.where(length > 0, length, 1), 0)


# One factor a column, in float32, of which backward keeps no copy as large as the product. An operator, so that
# a compiled graph keeps none either.
@operator("rescale", "(Tensor product, Tensor factor, Tensor? bias) -> Tensor")
def rescale(product: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    y = product * factor
    return (y if bias is None else y + bias).to(product.dtype)


@rescale.register_fake
def _(product: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(product)


def rescale_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def rescale_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    product, factor = ctx.saved_tensors
    need_product, need_factor, need_bias = ctx.needs_input_grad
    dproduct = (dy * factor).to(product.dtype) if need_product else None
    dfactor = (dy.to(factor.dtype) * product).reshape(-1, len(factor)).sum(0) if need_factor else None
    return dproduct, dfactor, dy.reshape(-1, len(factor)).sum(0) if need_bias else None


rescale.register_autograd(rescale_backward, setup_context=rescale_context)


def direct_squares(
    weight: Float[Tensor, "N K"], a: Float[Tensor, "R K"], b: Float[Tensor, "N R"], scaling: float
) -> Float[Tensor, " N"]:
    """Each row's |W + s B A|² from the rows themselves, some at a time, summed in float64."""
    parts = []
    for start in range(0, weight.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        merged = torch.addmm(weight[rows].float(), b[rows].float(), a.float(), alpha=scaling)
        parts.append(merged.double().square().sum(1))
    return torch.cat(parts)


def expanded_squares(
    squares: Float[Tensor, " N"],
    projected: Float[Tensor, "N R"],
    a: Float[Tensor, "R K"],
    b: Float[Tensor, "N R"],
    scaling: float,
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Each row's |W + s B A|² from |W|² and W Aᵀ, in float64, and the rows of which little is known.

    These have a square no smaller than what rounding may have left.
    """
    a, b = a.double(), b.double()
    cross = 2 * scaling * (b * projected.double()).sum(1)
    terms = squares + scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
    total = terms + cross
    return torch.maximum(total, ROUNDING * terms), total < DOUBTFUL * terms
