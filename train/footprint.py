"""Where the bytes of a fine-tuning are: the stored base, the 16-bit rest, adapters, and the optimizer's state."""

from dataclasses import dataclass

import torch

from models import Model
from models.precision import QUANTIZED, parts_in_memory


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
    parts = parts_in_memory(model)
    quantized = sum(parts[QUANTIZED].nbytes.values())
    trained = [p for p in model.parameters() if p.requires_grad]
    adapters = sum(p.nbytes for p in trained)
    return Footprint(
        quantized=quantized,
        bits_per_weight=parts[QUANTIZED].bits_per_weight,
        rest=parts.nbytes - quantized - adapters,
        adapters=adapters,
        gradients=adapters,
        optimizer=states_per_parameter * torch.float32.itemsize * sum(p.numel() for p in trained),
    )
