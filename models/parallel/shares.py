"""What one process keeps of a tensor that several share: some of its rows, as FSDP2 cuts them.

A tensor with R rows (its first dimension) on N processes is cut into pieces of ceil(R / N) rows; the last ones may be
smaller, or empty. A shared parameter is torch's DTensor: its shape is that of the whole, and `local` is the plain
tensor of the rows that are here. Everything else is whole on every process, and is its own share.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.parallel import world


def rows(count: int, rank: int | None = None, size: int | None = None) -> range:
    """Which of so many rows a process keeps, by default this one."""
    rank, size = world.rank() if rank is None else rank, world.size() if size is None else size
    each = -(-count // size)
    return range(min(rank * each, count), min((rank + 1) * each, count))


def is_shared(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process keeps; it shares memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> None:
    """Copy this process's part of a whole value into the tensor."""
    if isinstance(tensor, DTensor):
        kept = rows(value.shape[0])
        value = value[kept.start : kept.stop]
    local(tensor).copy_(value)


@torch.no_grad()
def collected(tensor: Tensor) -> Tensor | None:
    """The whole of a tensor in the CPU's memory of the main process; None on the others.

    All processes have to ask for it, in the same order.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach().cpu() if world.is_main() else None
    mine = local(tensor).detach().cpu().contiguous()
    if not world.is_main():
        if mine.numel():
            dist.send(mine, dst=0)
        return None
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for rank in range(world.size()):
        kept = rows(tensor.shape[0], rank)
        part = whole[kept.start : kept.stop]
        if rank == 0:
            part.copy_(mine)
        elif part.numel():
            dist.recv(part, src=rank)
    return whole


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """A time in which the main process has all that is trained whole, in the CPU's memory, and can save it as ever."""
    places = [
        (module, leaf, parameter)
        for module in model.modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if is_shared(parameter) and parameter.requires_grad
    ]
    others = [collected(parameter) for _, _, parameter in places]
    for (module, leaf, _), other in zip(places, others, strict=True):
        if other is not None:
            setattr(module, leaf, nn.Parameter(other))
    try:
        yield
    finally:
        for module, leaf, parameter in places:
            setattr(module, leaf, parameter)
