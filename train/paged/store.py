"""Where an optimizer keeps its states: one piece of memory for all parameters, slot after slot.

A slot is one kind of state (the mean of gradients, say). In each slot the parameters follow one another, every one at
the same position, counted in elements of parameters:

    exp_avg      | p0 ....... | p1 ... | p2 ............. |
    exp_avg_sq   | p0 ....... | p1 ... | p2 ............. |
                 0            starts[1]                  total

so that a range of positions, a window, is one range of bytes in each slot. Windows are what is paged: parameters
may be smaller than one or larger, and are then updated in pieces.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from train.paged.arena import Arena

# Positions where parameters and windows may begin: whole blocks of 256 states, whose scales then lie 16 bytes apart.
ALIGNMENT = 1024
SLOT_ALIGNMENT = 256  # bytes


class Slot(NamedTuple):
    """One kind of state: its name, its type, and how many elements of a parameter share one entry."""

    name: str
    dtype: torch.dtype
    per: int = 1

    def shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The state's shape for a parameter of this shape."""
        return tuple(shape) if self.per == 1 else (-(-prod(shape) // self.per),)


class Piece(NamedTuple):
    """Elements `start` to `stop` of the parameter with number `index`, and their states, a flat tensor per slot."""

    index: int
    start: int
    stop: int
    states: tuple[Tensor, ...]


class Ordinary:
    """Memory as torch gives it, on the parameters' own device."""

    kind = "ordinary"

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes, self.device = nbytes, device
        self.bytes: Tensor | None = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor over the bytes from `offset` on."""
        assert self.bytes is not None
        return self.bytes[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def close(self) -> None:
        """Let go of the memory; it is freed with the last tensor over it."""
        self.bytes = None


Memory = Arena | Ordinary


class Store:
    """The states of parameters of the given shapes, all zero at first."""

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        slots: Sequence[Slot],
        allocate: Callable[[int], Memory],
        window_bytes: int | None = None,
    ) -> None:
        """Allocate once, `allocate(nbytes)`; without `window_bytes` there is one window."""
        self.shapes, self.slots = tuple(shapes), tuple(slots)
        sizes = [round_up(prod(shape), ALIGNMENT) for shape in shapes]
        *self.starts, self.total = accumulate(sizes, initial=0)
        lengths = [round_up(self.total // slot.per * slot.dtype.itemsize, SLOT_ALIGNMENT) for slot in slots]
        *self.offsets, nbytes = accumulate(lengths, initial=0)
        width = self.total
        if window_bytes is not None:
            per_position = sum(slot.dtype.itemsize / slot.per for slot in slots)
            width = max(int(window_bytes / per_position) // ALIGNMENT, 1) * ALIGNMENT
        self.windows = [(a, min(a + width, self.total)) for a in range(0, self.total, max(width, 1))]
        self.memory = allocate(max(nbytes, SLOT_ALIGNMENT))
        self.clear()
        self.pieces = [self.pieces_of(*window) for window in self.windows]

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def clear(self) -> None:
        """Make every state zero."""
        self.memory.tensor(0, (self.nbytes,), torch.uint8).zero_()

    def states(self, index: int) -> dict[str, Tensor]:
        """The states of parameter `index` by the names of their slots, in their shapes."""
        return {
            slot.name: self.slot_tensor(i, self.starts[index], slot.shape(self.shapes[index]))
            for i, slot in enumerate(self.slots)
        }

    def slot_tensor(self, slot: int, position: int, shape: tuple[int, ...]) -> Tensor:
        """Entries of a slot from a position on."""
        _, dtype, per = self.slots[slot]
        return self.memory.tensor(self.offsets[slot] + position // per * dtype.itemsize, shape, dtype)

    def byte_ranges(self, window: int) -> list[tuple[int, int]]:
        """Where a window's states are in memory, a range per slot."""
        a, b = self.windows[window]
        return [
            (offset + a // slot.per * slot.dtype.itemsize, offset + b // slot.per * slot.dtype.itemsize)
            for offset, slot in zip(self.offsets, self.slots, strict=True)
        ]

    def pieces_of(self, a: int, b: int) -> list[Piece]:
        """What of which parameters lies in a window."""
        pieces = []
        for index in range(bisect_right(self.starts, a) - 1, len(self.shapes)):
            first = self.starts[index]
            if first >= b:
                break
            start, stop = max(a - first, 0), min(b - first, prod(self.shapes[index]))
            if start < stop:
                states = tuple(
                    self.slot_tensor(i, first + start, (-(-(stop - start) // slot.per),))
                    for i, slot in enumerate(self.slots)
                )
                pieces.append(Piece(index, start, stop, states))
        return pieces

    def close(self) -> None:
        """Give the memory back: now, or with the last tensor over it that someone holds."""
        self.pieces.clear()
        self.memory.close()


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
