"""Where the bytes of a fine-tuning are: the stored base, the 16-bit rest, adapters, and the optimizer's states."""

from dataclasses import dataclass

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
    """States that stay where they are."""
    managed: int
    """States in managed memory, which leave the device when activations need the room."""


def footprint(model: Model, state_bytes: int, managed_bytes: int = 0) -> Footprint:
    """Count the bytes of a model with adapters, whose optimizer has states of which `managed_bytes` are managed."""
    parts = parts_in_memory(model)
    quantized = sum(parts[QUANTIZED].nbytes.values())
    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return Footprint(
        quantized=quantized,
        bits_per_weight=parts[QUANTIZED].bits_per_weight,
        rest=parts.nbytes - quantized - adapters,
        adapters=adapters,
        gradients=adapters,
        optimizer=state_bytes - managed_bytes,
        managed=managed_bytes,
    )
