"""Keys and values of the tokens already seen, so that each new token costs one step and not the whole text.

Axes: B batch, H query heads, K key/value heads, S room in tokens, C channels per head. Memory is taken once, for the
longest text that will be generated. Beam search makes several rows of one text (`repeat`), then goes on with some
and leaves others (`select`).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class LayerCache:
    """One layer's keys and values."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.empty(shape, dtype=dtype, device=device)  # (B, K, S, C)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @classmethod
    def of(cls, keys: Float[Tensor, "B K S C"], values: Float[Tensor, "B K S C"]) -> "LayerCache":
        """A cache that is full: of another text, which does not grow."""
        cache = cls.__new__(cls)
        cache.keys, cache.values, cache.length = keys, values, keys.shape[2]
        return cache

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

    def repeat(self, times: int) -> None:
        """Make as many adjacent rows of each."""
        room = self.keys.shape[2]
        self.keys, self.values = (
            kept[:, :, : self.length].repeat_interleave(times, dim=0) for kept in (self.keys, self.values)
        )
        if room > self.length:
            self.keys, self.values = (F.pad(kept, (0, 0, 0, room - self.length)) for kept in (self.keys, self.values))

    def select(self, rows: Int[Tensor, " B"]) -> None:
        """Let each row go on from the one that is named for it."""
        for kept in (self.keys, self.values):
            kept[:, :, : self.length] = kept[rows, :, : self.length]


@dataclass
class Cache:
    """Every layer's cache, and how many tokens all of them hold."""

    layers: list[LayerCache]
    cross: list[LayerCache] = field(default_factory=list)
    """In a decoder that reads an encoder's output: every layer's keys and values of it."""
    length: int = 0

    def repeat(self, times: int) -> None:
        """Make as many adjacent rows of each: the beams of a text."""
        for layer in (*self.layers, *self.cross):
            layer.repeat(times)

    def select(self, rows: Int[Tensor, " B"]) -> None:
        """Let each row go on from the one that is named for it, which reads the same encoder's output."""
        for layer in self.layers:
            layer.select(rows)


def attend_to_all(
    q: Float[Tensor, "B H 1 C"],
    k: Float[Tensor, "B K S C"],
    v: Float[Tensor, "B K S C"],
    mask: Bool[Tensor, "B 1 1 S"] | None,
) -> Float[Tensor, "B H 1 C"]:
    """What one new token of each row draws from the tokens so far; without a mask, from all of them.

    Query heads that share keys and values stand as so many queries of one head, for which nothing need be copied: on
    a CPU, torch's own way for shared heads took four to seven times as long.
    """
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1])  # (B, K, H / K, C)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)
