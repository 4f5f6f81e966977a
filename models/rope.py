"""Rotary positions: each pair of channels (c, c + C/2) turns by an angle that grows with the position.

Axes: B batch, T tokens, C channels per head. Angles are computed in float32 from the config on
every forward pass (a few hundred numbers), so no cast of the model can round them.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.config import LlamaConfig


def rotary_table(
    positions: Int[Tensor, "B T"], config: LlamaConfig
) -> tuple[Float[Tensor, "B 1 T half"], Float[Tensor, "B 1 T half"]]:
    """Cosines and sines of every position and channel pair, float32, with an axis of 1 for the heads.

    `kernels.rotate` turns by them.
    """
    angles = (positions[..., None].float() * inverse_frequencies(config, positions.device))[:, None]
    return angles.cos(), angles.sin()


def inverse_frequencies(config: LlamaConfig, device: torch.device) -> Float[Tensor, " half"]:
    """Radians per position of each channel pair, with the config's scaling."""
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor

    # llama3: short wavelengths stay, long ones are divided by factor, those between are mixed linearly
    # in the number of turns that fit into the original context.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor
