"""What a run that found too little memory is told: a plan that fits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from models.device import is_out_of_memory, pick_device
from models.errors import Refusal
from train.planner.gpus import CONTEXT
from train.planner.switches import suggestion


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
    """What this process could have of a device's memory: all that others leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) + CONTEXT
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
