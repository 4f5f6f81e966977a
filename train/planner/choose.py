"""Whether each process has the whole model or a share of it, where that is left to be decided."""

from typing import Any, Literal

import torch

from models.device import pick_dtype
from models.parallel import world
from train.planner.advice import available
from train.planner.gpus import Gpu
from train.planner.jobs import job_of
from train.planner.plan import plan

Way = Literal["auto", "ddp", "fsdp"]


def choose(config: Any, longest: int, device: torch.device) -> Way:
    """What `distributed = "auto"` is for a run on the processes that there are: ddp where every device holds a step.

    `longest` is the data's longest text in tokens. The device with the least room decides, and the main process for
    all of them, so that they agree; all have to ask. What is decided already stays, and alone there is nothing to
    decide.
    """
    if config.distributed != "auto" or world.size() == 1:
        return config.distributed
    (missing,) = world.most(-available(device))
    way: Way = "ddp"
    if world.is_main():
        dtype = pick_dtype(config.dtype, device)
        job = job_of(config, dtype, longest, config.data.target_max_len or 128, world.size())
        way = "ddp" if plan(job, device.type).fits(Gpu(device.type, int(-missing))) else "fsdp"
    return world.from_main(way)
