"""Which collective an error comes from: torch's errors say what the network did, not what was asked of it.

torch's gloo says "Connection closed by peer" or "Timed out waiting"; the name is in the traceback, as the function of
torch.distributed that was called. Two callers wait for a collective elsewhere than where they have begun it: FSDP2,
whose own functions then tell which, and DDP, which sums gradients from within the backward pass.
"""

import re
import traceback

import torch
import torch.distributed as dist

SIGNS = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL error")
"""What stands in the text of an error of the network between processes; some have a class of their own."""
LATE = ("timed out", "timeout")
COLLECTIVES = ("distributed_c10d.py", "_functional_collectives.py")
"""Files of torch.distributed whose functions are the collectives."""
FORMERLY = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}
"""Names that torch 2.13 has given to functions which everybody knows by another."""
WAITS = ("wait", "wait_tensor")
"""Functions that wait for what was begun elsewhere."""
BY_FSDP = {"reduce": "reduce_scatter_tensor", "post_backward": "reduce_scatter_tensor"} | dict.fromkeys(
    ("all_gather", "unshard", "pre_forward", "pre_backward"), "all_gather_into_tensor"
)
"""Parts of the names of FSDP2's functions, with what they wait for."""


def is_of_collective(error: BaseException) -> bool:
    """Has the network between processes failed, rather than something in this one?"""
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in SIGNS)


def is_late(error: BaseException) -> bool:
    """Has it failed because nobody answered in time?"""
    return any(sign in str(error).lower() for sign in LATE)


def said(error: BaseException) -> str:
    """What the network said, in short: without the place in its source, and without its advice."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[[^]]*\] ", "", line).partition(". ")[0]


def collective(error: BaseException) -> str:
    """The name of the collective that has failed, as torch.distributed calls it."""
    frames = [(frame.filename, frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    for file, name in frames:
        if file.endswith(COLLECTIVES) and not name.startswith("_") and name not in WAITS:
            return FORMERLY.get(name, name)
    for file, name in reversed(frames):
        for part, meant in BY_FSDP.items():
            if "/fsdp/" in file and part in name:
                return meant
    if any("/torch/autograd/" in file or "/nn/parallel/" in file for file, _ in frames):
        return "all_reduce"
    return "a collective"
