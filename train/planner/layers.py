"""The number of blocks of a model, by which its memory grows."""

from collections.abc import Mapping
from typing import Any

COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers")


def layers_of(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """How many blocks each stack has."""
    counts = [raw[name] for name in COUNTS if isinstance(raw.get(name), int)]
    if raw.get("model_type") == "t5" and len(counts) == 1:
        counts *= 2  # the decoder has as many as the encoder where nothing is said of it
    return tuple(counts)


def with_layers(raw: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The same config with so many blocks in each stack."""
    return {**raw, **{name: count for name in COUNTS if name in raw}}
