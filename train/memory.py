"""The most memory that was in use so far, as the device counts it."""

import sys

import torch


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Give the peak of tensors on a CUDA device, or the peak resident size of this process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux and the BSDs KiB
