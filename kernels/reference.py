"""The definition of every operator, in plain torch.

What the fast forms compute must agree with this, forward and backward; here the gradients are autograd's own.
The shapes of what a caller passes are checked here and answered in words, so the signatures leave them open.
M tokens, N outputs, K inputs, R rank.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nf4 import QuantizedTensor, dequantize, quantize

__all__ = ["dequantize", "drop", "dropout_mask", "dropout_seed", "nf4_linear", "nf4_lora_linear", "quantize"]


def nf4_linear(
    x: Float[Tensor, "..."], q: QuantizedTensor, bias: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """(..., K) -> (..., N): y = x W^T + bias, where W = dequantize(q) is (N, K)."""
    check_linear(x, q, bias)
    return F.linear(x, dequantize(q, x.dtype), cast(bias, x.dtype))


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
    y = F.linear(x, dequantize(q, x.dtype), cast(bias, x.dtype))
    if dropout:
        x = drop(x, dropout, dropout_seed() if seed is None else seed)
    return y + scaling * F.linear(F.linear(x, lora_a.to(x.dtype)), lora_b.to(x.dtype))


def drop(x: Float[Tensor, "..."], dropout: float, seed: int) -> Float[Tensor, "..."]:
    """x with a share of its entries set to zero and the others scaled up, so that the mean stays."""
    return thinned(x, dropout_mask(x.shape, dropout, seed, x.device), dropout)


def thinned(x: Float[Tensor, "..."], mask: Bool[Tensor, "..."], dropout: float) -> Float[Tensor, "..."]:
    """x where the mask keeps it, scaled up by what it drops."""
    return torch.where(mask, x * (1 / (1 - dropout)), 0)


def dropout_mask(shape: tuple[int, ...], dropout: float, seed: int, device: torch.device) -> Bool[Tensor, "..."]:
    """Which entries stay: the same for the same seed and shape, so that nothing need keep the mask.

    Four 16-bit numbers come out of each draw of 64 bits, twice as fast as one draw per entry; the share
    that is dropped is so rounded to a multiple of 2^-16.
    """
    generator = torch.Generator(device).manual_seed(seed)
    count = math.prod(shape)
    draws = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    draws.random_(-(2**63), None, generator=generator)
    return (draws.view(torch.int16)[:count] >= round(dropout * 2**16) - 2**15).view(shape)


def dropout_seed() -> int:
    """A seed from torch's default generator, which checkpointing rewinds when it runs a layer again."""
    return int(torch.randint(2**63 - 1, ()))


def check_linear(x: Tensor, q: QuantizedTensor, bias: Tensor | None) -> None:
    if len(q.shape) != 2:
        raise ValueError(f"a linear layer's weight is (outputs, inputs) but this one has the shape {q.shape}")
    out_features, in_features = q.shape
    features = x.shape[-1] if x.ndim else 0
    if features != in_features or not x.ndim:
        raise ValueError(f"x has {features} features per token but the weight takes {in_features}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"the bias has the shape {tuple(bias.shape)} but the weight gives {out_features} outputs")


def check_lora(
    x: Tensor, q: QuantizedTensor, lora_a: Tensor, lora_b: Tensor, dropout: float, bias: Tensor | None
) -> None:
    check_linear(x, q, bias)
    out_features, in_features = q.shape
    if lora_a.ndim != 2 or lora_a.shape[1] != in_features:
        raise ValueError(f"lora_a is {tuple(lora_a.shape)} but the weight takes (rank, {in_features})")
    if lora_b.shape != (out_features, lora_a.shape[0]):
        raise ValueError(
            f"lora_b is {tuple(lora_b.shape)} but the weight and lora_a take ({out_features}, {lora_a.shape[0]})"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is the share of inputs set to zero and must be in [0, 1), not {dropout}")


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
