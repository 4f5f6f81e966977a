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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.paged.arena import Arena
from train.paged.memory import Paging, memory_for
from train.paged.pager import Pager

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

    def nbytes(self, positions: int) -> int:
        """Bytes of the entries for so many elements, a whole number of entries."""
        return positions // self.per * self.dtype.itemsize


class Piece(NamedTuple):
    """Elements `start` to `stop` of parameter number `index`, and their states, a flat tensor per slot."""

    index: int
    start: int
    stop: int
    whole: bool
    """Whether these are all elements."""
    states: tuple[Tensor, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The elements out of a contiguous tensor of the parameter's shape."""
        return tensor if self.whole else tensor.view(-1)[self.start : self.stop]


class Store:
    """The states of some parameters, which are on one device; all zero at first."""

    def __init__(self, owner: str, parameters: Sequence[Tensor], slots: Sequence[Slot], paging: Paging | None) -> None:
        """Make room with one allocation. `owner` is the name of the optimizer in messages."""
        devices = sorted({str(p.device) for p in parameters})
        if len(devices) > 1:
            raise ValueError(f"the parameters of one {owner} must be on one device, not on {' and '.join(devices)}")
        self.parameters, self.slots = tuple(parameters), tuple(slots)
        self.indices = {p: index for index, p in enumerate(parameters)}
        self.steps = torch.zeros(len(parameters), device="cpu")  # float32, as torch counts them
        sizes = [round_up(p.numel(), ALIGNMENT) for p in parameters]
        *self.starts, self.total = accumulate(sizes, initial=0)
        lengths = [round_up(slot.nbytes(self.total), SLOT_ALIGNMENT) for slot in slots]
        *self.offsets, nbytes = accumulate(lengths, initial=0)

        self.memory = memory_for(owner, max(nbytes, SLOT_ALIGNMENT), parameters[0].device, paging)
        self.memory.tensor(0, (self.memory.nbytes,), torch.uint8).zero_()
        self.begun: set[Tensor] = set()  # parameters whose states are no longer zero
        managed = isinstance(self.memory, Arena) and self.memory.kind == "managed"
        self.windows = self.cut(paging.window_bytes if paging and managed else None)
        self.pieces = [self.pieces_of(*window) for window in self.windows]
        self.pager: Pager | None = None
        if isinstance(self.memory, Arena) and managed:
            self.pager = Pager(self.memory, [self.byte_ranges(*window) for window in self.windows])

    def covers(self, parameters: Iterable[Tensor]) -> bool:
        """Whether there is room for all of these, where they are."""
        return all(p in self.indices and p.device == self.memory.device for p in parameters)

    def states(self, parameter: Tensor) -> dict[str, Tensor]:
        """How many steps a parameter has made, and its states by the names of their slots, in their shapes."""
        index = self.indices[parameter]
        states = {slot.name: self.entries(slot, self.starts[index], slot.shape(parameter.shape)) for slot in self.slots}
        return {"step": self.steps[index], **states}

    def visit(self) -> Iterator[list[Piece]]:
        """The pieces of one window after the other, each when its states may be touched."""
        for window in self.pager.visit() if self.pager else range(len(self.windows)):
            yield self.pieces[window]

    def begin(self, parameter: Tensor) -> dict[str, Tensor]:
        """The states of a parameter, zero again if they were anything else before."""
        states = self.states(parameter)
        if parameter in self.begun:
            self.prefetch()
            for state in states.values():
                state.zero_()
        self.begun.add(parameter)
        return states

    def fill(self, sources: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Copy the states of parameters into their places."""
        self.prefetch()
        for parameter, source in sources.items():
            for name, state in self.states(parameter).items():
                state.copy_(torch.as_tensor(source[name]))
        self.begun |= sources.keys()

    def evict(self) -> None:
        """Move states to the CPU, if they are paged."""
        if self.pager:
            self.pager.evict()

    def prefetch(self) -> None:
        """Move states to the device, if they are paged."""
        if self.pager:
            self.pager.prefetch()

    def close(self) -> None:
        """Give the memory back: now, or with the last tensor over it that someone holds."""
        self.pieces.clear()
        self.memory.close()

    # The layout

    def entries(self, slot: Slot, position: int, shape: tuple[int, ...]) -> Tensor:
        """Entries of a slot from a position on."""
        return self.memory.tensor(self.offset(slot) + slot.nbytes(position), shape, slot.dtype)

    def offset(self, slot: Slot) -> int:
        """The first byte of a slot."""
        return self.offsets[self.slots.index(slot)]

    def cut(self, window_bytes: int | None) -> list[tuple[int, int]]:
        """Windows of about so many bytes of states, as ranges of positions; without a size there is one."""
        width = self.total
        if window_bytes is not None:
            positions = int(window_bytes / sum(slot.dtype.itemsize / slot.per for slot in self.slots))
            width = max(positions // ALIGNMENT, 1) * ALIGNMENT
        return [(start, min(start + width, self.total)) for start in range(0, self.total, max(width, 1))]

    def byte_ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where the states of a window are in memory, a range per slot."""
        return [(self.offset(slot) + slot.nbytes(start), self.offset(slot) + slot.nbytes(stop)) for slot in self.slots]

    def pieces_of(self, start: int, stop: int) -> list[Piece]:
        """What of which parameters lies in a window."""
        pieces = []
        for index in range(bisect_right(self.starts, start) - 1, len(self.parameters)):
            own, length = self.starts[index], self.parameters[index].numel()
            if own >= stop:
                break
            first, last = max(start - own, 0), min(stop - own, length)
            if first < last:
                shapes = [(-(-(last - first) // slot.per),) for slot in self.slots]
                states = [self.entries(slot, own + first, s) for slot, s in zip(self.slots, shapes, strict=True)]
                pieces.append(Piece(index, first, last, last - first == length, tuple(states)))
        return pieces


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
