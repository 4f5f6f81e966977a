"""Keys and values of the tokens already seen, so that each new token costs one step and not the whole text.

Axes: B batch, K key/value heads, S room in tokens, C channels per head. Memory is taken once, for the
longest text that will be generated.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


class LayerCache:
    """One layer's keys and values."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.empty(shape, dtype=dtype, device=device)  # (B, K, S, C)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(
        self, keys: Float[Tensor, "B K T C"], values: Float[Tensor, "B K T C"]
    ) -> tuple[Float[Tensor, "B K S C"], Float[Tensor, "B K S C"]]:
        """Keep the new keys and values; all of them so far come back, as views."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache has room for {self.keys.shape[2]} tokens; {end} do not fit")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass
class Cache:
    """Every layer's cache, and how many tokens all of them hold."""

    layers: list[LayerCache]
    length: int = 0
