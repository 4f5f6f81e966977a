"""Every operator on stored weights: the fast form for a device, and its definition in `reference`."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from kernels import ops, reference
from kernels.attention import attention
from kernels.dispatch import form
from kernels.layer_ops import linear_cross_entropy, rms_norm, rotate, swiglu
from kernels.linear import nf4_linear, nf4_lora_linear
from nf4 import QuantConfig, QuantizedTensor

__all__ = [
    "attention",
    "dequantize",
    "linear_cross_entropy",
    "nf4_linear",
    "nf4_lora_linear",
    "quantize",
    "reference",
    "rms_norm",
    "rotate",
    "swiglu",
]


def quantize(
    weight: Shaped[Tensor, "..."], config: QuantConfig = QuantConfig(), *, name: str = "weight"
) -> QuantizedTensor:
    """Round every weight to the nearest level of its block."""
    return form("quantize", weight.device, weight, config)(weight, config, name=name)


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Float[Tensor, "..."]:
    """The weight that is stored: level times scale in float32, then one rounding to `dtype`."""
    return ops.dequantize(*ops.parts(q), dtype or q.dtype)
