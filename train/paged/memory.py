"""Which memory states get: an arena of managed memory if they are to be paged and can be, else ordinary memory."""

import logging
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from train.paged import libraries
from train.paged.arena import Arena
from train.paged.cudart import Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Paging:
    """That states are to be in managed memory, and how."""

    allow_oversubscription: bool = False
    """Allocate even if the device could not hold all managed memory at once."""
    window_bytes: int = 64 * 2**20
    """States that are prefetched and updated together."""
    runtime: Runtime | None = None
    """The CUDA runtime to allocate with; by default the one that torch uses. It is not pickled."""

    def __post_init__(self) -> None:
        if self.window_bytes < 1:
            raise ValueError(f"window_bytes must be at least 1, not {self.window_bytes}")


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


def memory_for(owner: str, nbytes: int, device: torch.device, paging: Paging | None) -> Memory:
    """Memory for an optimizer of this name. Without a GPU a runtime has to be given for states to be paged."""
    if paging is None:
        return Ordinary(nbytes, device)
    if device.type != "cuda" and paging.runtime is None:
        say_unpaged(owner, device.type)
        return Ordinary(nbytes, device)
    runtime = paging.runtime or libraries.find()
    return Arena(nbytes, device, runtime, allow_oversubscription=paging.allow_oversubscription)


@lru_cache
def say_unpaged(owner: str, device: str) -> None:
    """Say it once: results are the same, so nobody need hear it at every step."""
    log.warning("%s: managed memory needs a CUDA device and these parameters are on the %s, so states are in "
                "ordinary memory; results are the same", owner, device)  # fmt: skip
