"""How far a stored weight is from the one it stands for."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nf4.blockwise import QuantizedTensor, decode


@dataclass(frozen=True)
class WeightError:
    """The difference between a weight and what its stored form decodes to, rounding to its dtype included."""

    relative: float
    """Frobenius norm of the difference over that of the weight."""
    snr_db: float
    """The same as a signal-to-noise ratio in decibels: -20 log10(relative)."""
    max: float
    """Largest magnitude of the difference."""
    mse: float
    """Mean square of the difference."""


@torch.no_grad()
def error(weight: Float[Tensor, "..."], q: QuantizedTensor) -> WeightError:
    """Measure what storing `weight` as `q` lost; sums are taken in float64."""
    if tuple(weight.shape) != q.shape:
        raise ValueError(f"the weight has the shape {tuple(weight.shape)} but the stored one {q.shape}")
    flat = weight.detach().reshape(-1)
    signal = noise = largest = 0.0
    for start, values in decode(q):
        true = flat[start : start + len(values)].double()
        difference = true - values.to(q.dtype).double()
        signal += float(true.square().sum())
        noise += float(difference.square().sum())
        largest = max(largest, float(difference.abs().max()))
    relative = math.sqrt(noise / signal) if signal else (math.inf if noise else 0.0)
    return WeightError(
        relative=relative,
        snr_db=-20 * math.log10(relative) if relative else math.inf,
        max=largest,
        mse=noise / q.numel if q.numel else 0.0,
    )
