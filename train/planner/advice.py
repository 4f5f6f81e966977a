"""What a run that found too little memory is told: a plan that fits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from models.device import is_out_of_memory, pick_device, pick_dtype
from models.errors import Refusal
from models.parallel import world
from train.planner.gpus import CONTEXT, GIB, Gpu
from train.planner.jobs import job_of
from train.planner.switches import devices_needed, fitting, plan


@contextmanager
def advised(config: Any, longest: int) -> Iterator[None]:
    """A time in which running out of memory gets a note of what would fit; `longest` is the data's longest text."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            try:
                device = pick_device(config.device)
                error.add_note(suggestion(config, available(device), max_len=longest, device=device))
            except Refusal as refusal:
                error.add_note(f"there is no plan of what would fit: {refusal}")
        raise


def available(device: torch.device) -> int:
    """What this process could have of a device's memory: all that others leave, of a CPU's its part."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) + CONTEXT
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world.size() > 1 else 1
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // here


def suggestion(
    config: Any, available_bytes: int, *, max_len: int | None = None, device: torch.device = torch.device("cuda")
) -> str:
    """A plan that fits, for a run that found too little memory: what to change, and what that takes.

    Nothing is allocated on the device. `max_len` is the longest text of the data, where no setting says it.
    """
    tokens = max_len or config.data.max_len or 512
    dtype = pick_dtype(config.dtype, device)
    job = job_of(config, dtype, tokens, config.data.target_max_len or 128, world.size())
    gpu = Gpu(device.type, available_bytes)
    before = plan(job, device.type)
    steps, after = fitting(job, gpu, device.type)
    needs = f"by plan this takes {gib(before.takes(gpu))} of {gib(available_bytes)}"
    if after is not None and not steps:
        return f"{needs}, which fits: something else holds memory of the device"
    spread = devices_needed(job, gpu) if device.type == "cuda" else None
    flags = " ".join(switch.flags for switch in steps)
    found = [] if after is None else [f"with {flags}: {gib(after.takes(gpu))}"]
    if spread is not None:
        found.append(f"on {more_devices(spread.job.processes)}: {gib(spread.takes(gpu))} on each")
    if found:
        return f"{needs}; it fits {', or '.join(found)}"
    smallest = steps[-1].plan if steps else before
    return (
        f"{needs}, and no setting makes it fit: the least found is {gib(smallest.takes(gpu))}; "
        "take a smaller model or a larger device"
    )


def more_devices(processes: int) -> str:
    """How a step is shared by several GPUs, in words and flags."""
    return f"{processes} such GPUs with --nproc {processes} --distributed fsdp"


def gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB"
