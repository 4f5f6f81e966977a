"""The most memory that was in use so far, as the device counts it."""

import contextlib
import re
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Give the peak of tensors on a CUDA device, or the peak resident size of this process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():  # Linux; getrusage there counts what a parent process held before it started this one
        found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
        assert found
        return int(found.group(1)) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Let the peaks start from what is in use now, before the next of several runs in one process.

    A system that does not allow it goes on counting from the start of the process.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")  # Linux: resets VmHWM
