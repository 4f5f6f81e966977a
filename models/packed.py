"""Packed rows: an attention mask that numbers the texts of a row 1, 2, 3, ..., with 0 for padding.

A token attends only to tokens with its own number, and positions count within it, so a text is read as if it
stood alone. Where each stands in one piece, as packing leaves them, a row costs what its texts would cost: each
goes through the causal kernel by itself. Axes: B batch, H query heads, K key/value heads, T tokens, C channels.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import kernels
from models.prefix_attention import attend_behind


@dataclass(frozen=True)
class Pieces:
    """What each row consists of: the number of a text, or 0 for padding, and how many tokens it has."""

    rows: tuple[tuple[tuple[int, int], ...], ...]


def positions_and_pieces(
    numbers: Int[Tensor, "B T"],
) -> tuple[Int[Tensor, "B T"], Pieces | Bool[Tensor, "B 1 T T"]]:
    """Rotary positions of packed rows and, if every text is in one piece, the pieces, else a mask."""
    pieces = pieces_of(numbers)
    index = torch.arange(numbers.shape[1], device=numbers.device)
    if pieces is not None:
        begins = torch.ones_like(numbers, dtype=torch.bool)
        begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        return index - (index * begins).cummax(dim=1).values, pieces
    alike = numbers[:, :, None] == numbers[:, None, :]
    seen = alike & (index[:, None] >= index)  # (B, T, T); padding sees padding, since a row of nothing is NaN
    return seen.sum(dim=2) - 1, seen[:, None]


def pieces_of(numbers: Int[Tensor, "B T"]) -> Pieces | None:
    """The pieces of each row; None if a text is interrupted by another one or by padding."""
    rows = []
    for row in numbers.cpu():
        found, lengths = (part.tolist() for part in torch.unique_consecutive(row, return_counts=True))
        texts = [number for number in found if number]
        if len(set(texts)) < len(texts):
            return None
        rows.append(tuple(zip(found, lengths, strict=True)))
    return Pieces(tuple(rows))


def attend(
    q: Float[Tensor, "B H T C"],
    k: Float[Tensor, "B K T C"],
    v: Float[Tensor, "B K T C"],
    pieces: Pieces,
    prefix: Float[Tensor, "2 K P C"] | None = None,
) -> Float[Tensor, "B H T C"]:
    """Causal attention within each text, each behind the prefix if there is one; nothing comes out for padding."""

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attention(q, k, v) if prefix is None else attend_behind(prefix, q, k, v, None)

    rows = []
    for row, *tensors in zip(pieces.rows, q.split(1), k.split(1), v.split(1), strict=True):
        # Split and joined in one operation each: a slice's gradient would be as large as all of q for every text.
        parts = zip(*(tensor.split([length for _, length in row], dim=2) for tensor in tensors), strict=True)
        texts = [
            alone(*part) if number else torch.zeros_like(part[0]) for (number, _), part in zip(row, parts, strict=True)
        ]
        rows.append(torch.cat(texts, dim=2))
    return torch.cat(rows)


def is_packed(attention_mask: Tensor) -> bool:
    """Whether a mask numbers several texts; one of true and false, or of fractions, never does."""
    whole = not (attention_mask.is_floating_point() or attention_mask.dtype is torch.bool)
    return whole and attention_mask.numel() > 0 and bool((attention_mask > 1).any())


def refuse_packed(attention_mask: Tensor | None, reader: str) -> None:
    """Refuse a packed row where it would be read as one text.

    On a CPU alone: elsewhere the answer would be waited for, in every step; `qlora train` never gets that far.
    """
    if attention_mask is not None and attention_mask.device.type == "cpu" and is_packed(attention_mask):
        raise ValueError(
            f"attention_mask numbers several texts in a row (up to {int(attention_mask.max())}); "
            f"{reader} reads one text a row, with a mask of 0 and 1"
        )
