"""Which memory is alive at each moment, and what was alive when it was most.

Every storage has one entry from its creation until it is freed. A segment is a stretch of the step, such as the
backward pass of one block; the ledger keeps the fullest moment of each, since with the number of blocks the moment
moves at which memory is fullest.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

Segment = tuple[Any, ...]

WORK = "work of the moment"
KEPT = "kept for backward"


class Entry:
    """One storage: its bytes, the segment that it was made in, and what it is (None: an activation)."""

    __slots__ = ("label", "nbytes", "segment")

    def __init__(self, nbytes: int, segment: Segment, label: str | None) -> None:
        self.nbytes, self.segment, self.label = nbytes, segment, label


@dataclass
class Peak:
    """The fullest moment of a segment."""

    total: int = 0
    alive: list[Entry] | None = None
    """What was alive then; None while the moment may still go on."""
    extra: dict[str, int] = field(default_factory=dict)
    """What an operator took only for itself."""


class Ledger:
    """What is alive. `label` and `segment` are those of what is made next."""

    def __init__(self, granularity: int = 1) -> None:
        """`granularity` is what sizes are rounded up to, as an allocator does."""
        self.granularity = granularity
        self.label: str | None = None
        self.segment: Segment = ("start",)
        self.total = 0
        self.live: dict[int, Entry] = {}
        self.watched: dict[int, weakref.ref] = {}
        self.peaks: dict[Segment, Peak] = {}

    def note(self, tensor: torch.Tensor) -> None:
        """Enter a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        nbytes = self.rounded(storage.nbytes())
        self.live[key] = Entry(nbytes, self.segment, self.label)
        self.watched[key] = weakref.ref(storage, lambda _: self.free(key))
        self.total += nbytes
        self.reach()

    def free(self, key: int) -> None:
        """Take an entry out, after a look at whether this was the fullest moment."""
        self.look()
        self.total -= self.live.pop(key).nbytes
        del self.watched[key]

    def resize(self, tensor: torch.Tensor, nbytes: int, label: str | None) -> None:
        """Let a tensor's storage have another size from now on, as `UntypedStorage.resize_` gives it, and a label."""
        self.look()
        key = tensor.untyped_storage()._cdata
        entry = Entry(self.rounded(nbytes), self.segment, label)
        self.total += entry.nbytes - self.live[key].nbytes
        self.live[key] = entry  # a moment that is kept has the one before
        self.reach()

    def look(self) -> None:
        """Keep what is alive, if this is the fullest moment so far and it may end now."""
        peak = self.peaks.get(self.segment)
        if peak is not None and peak.alive is None and peak.total == self.total:
            peak.alive = list(self.live.values())

    def rounded(self, nbytes: int) -> int:
        """What the allocator takes for so many bytes."""
        return -(-nbytes // self.granularity) * self.granularity

    def reach(self, extra: int = 0, label: str = WORK) -> None:
        """See whether the moment, with `extra` bytes for an operator, is the fullest of its segment."""
        peak = self.peaks.get(self.segment)
        if peak is None or self.total + extra > peak.total:
            self.peaks[self.segment] = Peak(
                self.total + extra, list(self.live.values()) if extra else None, {label: extra} if extra else {}
            )

    def enter(self, segment: Segment) -> None:
        """Begin a segment, or go on with it."""
        if segment == self.segment:
            return
        self.settle()
        self.segment = segment
        self.reach()

    def begin(self, segment: Segment) -> None:
        """Forget what was before: what is alive now is what the moments from here on begin with."""
        self.peaks.clear()
        self.segment = segment
        self.reach()

    def settle(self) -> None:
        """Keep what is alive now, if this is the fullest moment of the segment that ends."""
        peak = self.peaks.get(self.segment)
        if peak is not None and peak.alive is None:
            assert peak.total == self.total
            peak.alive = list(self.live.values())

    def relabel(self, tensors: Iterable[torch.Tensor], label: str) -> None:
        """Say what some tensors are."""
        for tensor in tensors:
            entry = self.live.get(tensor.untyped_storage()._cdata)
            if entry is not None:
                entry.label = label

    def parts(self, segment: Segment) -> Counter[str]:
        """Bytes by what they were, at a segment's fullest moment."""
        peak = self.peaks[segment]
        parts: Counter[str] = Counter(peak.extra)
        for entry in peak.alive or ():
            parts[entry.label or (WORK if entry.segment == segment else KEPT)] += entry.nbytes
        assert sum(parts.values()) == peak.total
        return parts
