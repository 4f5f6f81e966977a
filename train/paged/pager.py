"""When states move: each window is brought to the device ahead of its update, and may leave it after the step.

Managed memory moves by itself where it is touched, a fault at a time, which stalls the kernel that touches it. So the
next window is prefetched on a stream of its own while the present one is updated. Before a step the states' preferred
location is the device; after it the CPU, which tells the driver what to evict when activations need room. While
nothing needs room nothing moves, and a step costs what it would cost unpaged.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from train.paged.arena import Arena
from train.paged.cudart import CPU, Advice, CudaError

log = logging.getLogger(__name__)

ByteRanges = Sequence[tuple[int, int]]
PAGE = 4096  # bytes


class Pager:
    """Moves the windows of one arena between the device and the CPU."""

    def __init__(self, arena: Arena, windows: Sequence[ByteRanges]) -> None:
        self.arena, self.windows = arena, in_pages(windows, arena.nbytes)
        self.device = arena.device.index or 0
        self.side = torch.cuda.Stream(arena.device) if arena.device.type == "cuda" else None
        self.told = False

    def visit(self) -> Iterator[int]:
        """The number of each window once its states are on their way, ordered before what is launched next.

        A prefetch is a hint: where the runtime refuses one, a line in the log says so once, and the update goes on,
        since a step half made would be worse than a slow one.
        """
        self.advise(self.device)
        fetched = self.fetch(0)
        for window in range(len(self.windows)):
            ready, fetched = fetched, self.fetch(window + 1)
            if ready is not None:
                torch.cuda.current_stream(self.arena.device).wait_event(ready)
            yield window
        self.advise(CPU)

    def fetch(self, window: int) -> Any:
        """Prefetch a window, if there is one; the CUDA event after which it has arrived, if there is a stream."""
        if window >= len(self.windows):
            return None
        self.move(self.windows[window], self.device)
        return self.side.record_event() if self.side else None

    def evict(self) -> None:
        """Move all states to the CPU, after what the current stream still has to do with them."""
        self.order_behind_current()
        self.advise(CPU)
        self.move([(0, self.arena.nbytes)], CPU)

    def prefetch(self) -> None:
        """Move all states to the device; what the current stream does next finds them there."""
        self.order_behind_current()
        self.advise(self.device)
        self.move([(0, self.arena.nbytes)], self.device)
        if self.side:
            torch.cuda.current_stream(self.arena.device).wait_stream(self.side)

    def order_behind_current(self) -> None:
        if self.side:
            self.side.wait_stream(torch.cuda.current_stream(self.arena.device))

    def move(self, ranges: ByteRanges, location: int) -> None:
        stream = self.side.cuda_stream if self.side else 0
        try:
            for start, stop in ranges:
                self.arena.prefetch(start, stop, location, stream)
        except CudaError as error:
            self.tell(error)

    def advise(self, location: int) -> None:
        try:
            self.arena.advise(0, self.arena.nbytes, Advice.SET_PREFERRED_LOCATION, location)
        except CudaError as error:
            self.tell(error)

    def tell(self, error: CudaError) -> None:
        if not self.told:
            log.warning(
                "optimizer states are paged without hints from here on, more slowly but as correctly: %s",
                str(error),  # whoever keeps the record would keep the error's frames, and the states in them
            )
        self.told = True


def in_pages(windows: Sequence[ByteRanges], nbytes: int) -> list[ByteRanges]:
    """Ranges of whole pages, each page in the first window that has some of it.

    On an H200 (CUDA 13.0) a prefetch was lost that began on a page which another had brought, and ended within the
    allocation: so ranges share none.
    """
    taken: set[int] = set()  # at the edges of ranges: elsewhere they share nothing
    cut: list[ByteRanges] = []
    for ranges in windows:
        own: list[tuple[int, int]] = []
        for start, stop in ranges:
            pages = range(start // PAGE, -(-stop // PAGE)) if start < stop else range(0)
            if pages and pages[0] in taken:
                pages = pages[1:]
            if pages and pages[-1] in taken:
                pages = pages[:-1]
            if pages:
                taken |= {pages[0], pages[-1]}
                own.append((pages[0] * PAGE, min((pages[-1] + 1) * PAGE, nbytes)))
        cut.append(own)
    return cut
