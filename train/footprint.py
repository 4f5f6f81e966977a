"""Where the bytes of a fine-tuning are: the stored base, the 16-bit rest, adapters, and the optimizer's state."""

from dataclasses import dataclass

import torch

from models import Model
from models.linear import NF4Linear


@dataclass(frozen=True)
class Footprint:
    """Bytes of tensors that stay for the whole run; activations come and go on top."""

    quantized: int
    """Codes and scales of the base."""
    bits_per_weight: float
    """Of the quantized layers, scales included."""
    rest: int
    """Base weights in the compute dtype: embedding, norms, head."""
    adapters: int
    gradients: int
    optimizer: int


def footprint(model: Model, states_per_parameter: int = 2) -> Footprint:
    """Count the bytes of a model with adapters; Adam keeps two states for each trained parameter."""
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    stored = [layer.quantized for layer in layers]
    codes = {id(p) for layer in layers for p in (layer.weight, layer.absmax_codes) if p is not None}
    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = sum(q.numel for q in stored)
    quantized = sum(q.nbytes for q in stored)
    rest = sum(p.nbytes for p in model.parameters() if not p.requires_grad and id(p) not in codes)
    float32 = torch.float32.itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Footprint(
        quantized=quantized,
        bits_per_weight=8 * quantized / weights if weights else 0.0,
        rest=rest,
        adapters=adapters,
        gradients=adapters,
        optimizer=states_per_parameter * float32 * trained,
    )
