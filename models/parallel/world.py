"""The processes that work on one job, and the few small things that they tell each other.

A process that was started alone is a world of one: everything here then answers at once and without torch.distributed,
so that callers need not ask. With more, they are those that torchrun (or `--nproc`) started, known by the environment
that it sets. What is said here is small and goes over the CPU, whatever the model is on: counts, decisions, refusals.

Every function but the first three has to be called by all processes in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from kernels.planned import stand
from models.errors import ConfigError
from models.parallel.board import launched, launched_as, number, reach
from models.parallel.failure import doing as doing
from models.parallel.failure import last_words as last_words
from models.parallel.failure import watched
from models.parallel.watch import TIMEOUT

T = TypeVar("T")


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if joined() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if joined() else 1


def is_main() -> bool:
    """Is this the process that writes files and talks?"""
    return rank() == 0


def joined() -> bool:
    """Is this one of several processes? (While it plans a step that it does not make, it is alone.)"""
    return dist.is_available() and dist.is_initialized() and stand.kind is None


@contextmanager
def world(device: torch.device | str, timeout: float = TIMEOUT) -> Iterator[torch.device]:
    """Be one of the processes that the launcher started, and give the device of this one.

    They meet on entering, and leave together. `timeout` is how many seconds any of them waits for the others, in a
    collective or at either end. If one fails, all do: see `failure`. Alone, nothing happens.
    """
    device = torch.device(device)
    if launched() == 1 or joined():
        yield device
        return
    device = own(device, number("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with watched() as watch:
        assert watch is not None
        watch.timeout = timeout
        watch.gather()
        with doing():
            dist.init_process_group(
                backend,
                timeout=timedelta(seconds=timeout),
                store=reach(),
                rank=launched_as(),
                world_size=launched(),
            )
            yield device
        watch.leave()  # whoever goes first would take the connections with it
        dist.destroy_process_group()  # after a failure that might wait for those who are gone


def own(device: torch.device, here: int) -> torch.device:
    """The device of this process, one of so many on this machine: of GPUs, that with its number."""
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(f"device: several processes work on cpu or cuda, not on {device}")
    if device.index is not None and here > 1:
        raise ConfigError(f"device: {device} is one GPU, but {here} processes need one each; give cuda")
    gpus = torch.cuda.device_count()
    if here > gpus:
        raise ConfigError(f"{here} processes need a GPU each, and this machine has {gpus}; start fewer, or give cpu")
    return torch.device("cuda", number("LOCAL_RANK", 0)) if device.index is None else device


def sums(*numbers: float) -> tuple[float, ...]:
    """Each number summed over the processes, in float64."""
    return reduced(numbers, dist.ReduceOp.SUM)


def most(*numbers: float) -> tuple[float, ...]:
    """The largest that any process has, of each number."""
    return reduced(numbers, dist.ReduceOp.MAX)


def reduced(numbers: tuple[float, ...], how: dist.ReduceOp.RedOpType) -> tuple[float, ...]:
    if size() == 1:
        return numbers
    values = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(values, how)
    return tuple(values.tolist())


def from_main(value: T) -> T:
    """What the main process has."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def from_all(value: T) -> list[T]:
    """What each process has, by rank."""
    if size() == 1:
        return [value]
    found: list[T | None] = [None] * size()
    dist.all_gather_object(found, value)
    return found  # pyrefly: ignore[bad-return]


def barrier() -> None:
    """Wait until all processes are here."""
    if size() > 1:
        dist.barrier()
