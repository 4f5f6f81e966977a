"""What one process keeps of a tensor that several share: some of its rows, as FSDP2 cuts them.

A tensor with R rows (its first dimension) on N processes is cut into pieces of ceil(R / N) rows; the last ones may be
smaller, or empty. A shared parameter is torch's DTensor: its shape is that of the whole, and `local` is the plain
tensor of the rows that are here. Everything else is whole on every process, and is its own share; so all of this also
holds for a model that nobody shares.

Rows travel through the CPU's memory: that happens when a model is loaded or saved, and there the disk is slower.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.parallel import world
from models.readers import Reader

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def rows(count: int, rank: int | None = None, size: int | None = None) -> range:
    """Which of so many rows a process keeps, by default this one."""
    rank, size = world.rank() if rank is None else rank, world.size() if size is None else size
    each = -(-count // size)
    return range(min(rank * each, count), min((rank + 1) * each, count))


def is_shared(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Does this process have only its rows of it?"""
    if not world.joined():
        return False
    from torch.distributed.tensor import DTensor  # half a second of imports, that most programs need not wait for

    return isinstance(tensor, DTensor)


def any_shared(model: nn.Module) -> bool:
    """Do several processes share the model? Blocks that are just being computed with do not look so."""
    return any(is_shared(parameter) for parameter in model.parameters())


def refuse_shared(model: nn.Module, what: str) -> None:
    """Refuse what needs a layer's whole weight here, of a model that is shared."""
    if any_shared(model):
        raise ValueError(
            f"{what} needs the whole model, and this process has a share of it; save what was trained, and do it with "
            "one process"
        )


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process keeps; it shares memory with it."""
    return tensor.to_local() if is_shared(tensor) else tensor


def home(tensor: Tensor) -> torch.device:
    """The device that a tensor is computed with on; shares may be kept in the CPU's memory until then."""
    if not is_shared(tensor):
        return tensor.device
    kind = tensor.device_mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


# From whole tensors to shares


@torch.no_grad()
def put(tensor: Tensor, value: Tensor | None, source: int | None = None) -> None:
    """Copy this process's part of a whole value into the tensor.

    The value is here, as it is on all processes; or only the process `source` has it, which gives the others theirs.
    All of them then have to ask for it, in the same order.
    """
    if source is not None and world.size() > 1:
        receive(tensor, value, source)
        return
    assert value is not None
    if is_shared(tensor):
        kept = rows(value.shape[0])
        value = value[kept.start : kept.stop]
    local(tensor).copy_(value)


def receive(tensor: Tensor, value: Tensor | None, source: int) -> None:
    mine = local(tensor)
    if not is_shared(tensor):
        sent = torch.empty(mine.shape, dtype=mine.dtype) if value is None else value.to("cpu", mine.dtype).contiguous()
        dist.broadcast(sent, source)
        mine.copy_(sent)
    elif value is not None:
        for rank in range(world.size()):
            kept = rows(tensor.shape[0], rank)
            part = value[kept.start : kept.stop].to("cpu", mine.dtype).contiguous()
            if rank == source:
                mine.copy_(part)
            elif part.numel():
                dist.send(part, dst=rank)
    elif mine.numel():
        part = torch.empty(mine.shape, dtype=mine.dtype)
        dist.recv(part, src=source)
        mine.copy_(part)


@torch.no_grad()
def read(tensor: Tensor, reader: Reader, name: str) -> None:
    """Read this process's part of a checkpoint's tensor, and no more of the file."""
    if is_shared(tensor):
        kept = rows(tensor.shape[0])
        local(tensor).copy_(reader.read_rows(name, kept.start, kept.stop))
    else:
        tensor.copy_(reader.read(name))


# From shares to whole tensors


@torch.no_grad()
def collected(tensor: Tensor) -> Tensor | None:
    """The whole of a tensor in the CPU's memory of the main process; None on the others.

    All processes have to ask for it, in the same order.
    """
    if not is_shared(tensor):
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


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor on every process, on the device that it is computed with; all have to ask for it."""
    if not is_shared(tensor):
        return tensor.detach()
    mine = local(tensor).detach().cpu()
    padded = mine.new_zeros((len(rows(tensor.shape[0], 0)), *mine.shape[1:]))
    padded[: len(mine)] = mine
    as_bytes = padded.view(-1).view(torch.uint8)
    parts = [torch.empty_like(as_bytes) for _ in range(world.size())]
    dist.all_gather(parts, as_bytes)
    whole = torch.cat(parts).view(tensor.dtype).view(-1, *mine.shape[1:])
    return whole[: tensor.shape[0]].to(home(tensor))


@contextmanager
def together(layer: nn.Module) -> Iterator[None]:
    """A time in which a layer has its whole parameters on every process, to look at; all have to enter it."""
    with replaced(layer.modules(), is_shared, gathered):
        yield


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """A time in which the main process has all that is trained whole, in the CPU's memory, and can save it as ever.

    The other processes have their shares as before, and only have to enter as well. The frozen base stays shared.
    """
    let_go(model)
    with replaced(model.modules(), lambda parameter: is_shared(parameter) and parameter.requires_grad, collected):
        yield


@contextmanager
def replaced(
    modules: Iterable[nn.Module], which: Callable[[Tensor], bool], by: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    """A time in which other tensors are in the place of parameters, where `by` gives one."""
    places = [
        (module, leaf, parameter)
        for module in modules
        for leaf, parameter in module.named_parameters(recurse=False)
        if which(parameter)
    ]
    others = [by(parameter) for _, _, parameter in places]
    for (module, leaf, parameter), other in zip(places, others, strict=True):
        if other is not None:
            setattr(module, leaf, nn.Parameter(other, requires_grad=parameter.requires_grad))
    try:
        yield
    finally:
        for module, leaf, parameter in places:
            setattr(module, leaf, parameter)


def let_go(model: nn.Module) -> None:
    """Leave nothing put together: after a forward pass without a backward one, the root's weights still are."""
    for unit in engaged(model):
        unit.reshard()


def engaged(model: nn.Module) -> list[Any]:
    """The modules that FSDP puts together and lets go of, the model itself first; none if nobody shares it."""
    if not world.joined():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
