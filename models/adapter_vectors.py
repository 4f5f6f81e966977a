"""What a saved adapter of IA3, BitFit or prefix tuning holds, tensor by tensor, without the model that it is for.

How far training has come shows in the root mean square of what a tensor does: of IA3's vectors that is their distance
from one, where they start; of biases and prefixes the values themselves, of a prefix for each layer's keys and values.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.config_fields import size
from models.errors import CheckpointError
from models.peft_names import PROMPT, released_name
from models.readers import Reader

KINDS = {"IA3": "distance from one", "BITFIT": "values", "PREFIX_TUNING": "values"}


@dataclass(frozen=True)
class Vector:
    """One tensor, or one layer's part of a prefix."""

    name: str
    numbers: int
    root_mean_square: float
    largest: float
    """In magnitude."""


def read_vectors(reader: Reader, raw: dict[str, Any], where: str) -> list[Vector]:
    """Every tensor that is not a module trained whole; `raw` is the adapter's configuration, in the file `where`."""
    kind, found = raw["peft_type"], []
    for name in reader.shapes:
        ours = released_name(name)
        if kind == "PREFIX_TUNING" and name == PROMPT[0]:
            found += prefix_vectors(reader.read(name), raw, where)
        elif kind == "IA3" and ours.endswith(".ia3_l"):
            found.append(vector(ours.removesuffix(".ia3_l"), reader.read(name) - 1))
        elif kind == "BITFIT" and ours.endswith(".bias"):
            found.append(vector(ours, reader.read(name)))
    if not found:
        raise CheckpointError(f"{where}: should hold {kind}, but none of its {len(reader.shapes)} tensors is of that")
    return found


def prefix_vectors(prefix: Tensor, raw: dict[str, Any], where: str) -> list[Vector]:
    layers = size(raw.get("num_layers"), f"{where}: num_layers")
    if prefix.ndim != 2 or prefix.shape[1] % (2 * layers):
        raise CheckpointError(f"{where}: a prefix of shape {list(prefix.shape)} does not split into {layers} layers")
    parts = prefix.chunk(2 * layers, dim=1)
    return [vector(f"layer {i // 2} {('keys', 'values')[i % 2]}", part) for i, part in enumerate(parts)]


def vector(name: str, values: Tensor) -> Vector:
    values = values.double()
    return Vector(name, values.numel(), float(values.square().mean().sqrt()), float(values.abs().max()))
