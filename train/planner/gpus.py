"""How much memory a GPU has, by its name or by a number.

Sizes are what vendors print, which are GiB. A process cannot have all of it: the CUDA context takes some hundred MiB,
NCCL has buffers of its own where there are several processes, and torch's allocator keeps its blocks in pieces that are
not always of use.
"""

import difflib
import re
from dataclasses import dataclass

from models.errors import ConfigError

GIB = 2**30
MIB = 2**20
CONTEXT = 600 * MIB  # CUDA context with the modules of torch and of some tens of kernels
NCCL = 400 * MIB  # buffers and kernels of a communicator, some hundred MiB: by rule, as the other two
FRAGMENTS = 0.02  # share of the tensors' bytes that the allocator holds beyond them

# A workspace of cuBLAS for each of the two threads that multiply, forward and backward: torch's default by chip.
WORKSPACE, WORKSPACE_HOPPER = 8 * MIB + 128 * 1024, 32 * MIB

GPUS = {
    "rtx-3060": 12, "rtx-3080": 10, "rtx-3090": 24, "rtx-4060-ti": 16, "rtx-4080": 16, "rtx-4090": 24, "rtx-5090": 32,
    "t4": 16, "v100": 16, "v100-32gb": 32, "l4": 24, "l40": 48, "l40s": 48, "a10": 24, "a10g": 24, "a16": 16,
    "a30": 24, "a40": 48, "a5000": 24, "a6000": 48, "rtx-a6000": 48, "rtx-6000-ada": 48, "a100": 40, "a100-40gb": 40,
    "a100-80gb": 80, "h100": 80, "h100-80gb": 80, "h200": 141, "b200": 180,
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """A GPU to plan for."""

    name: str
    nbytes: int

    @property
    def workspaces(self) -> int:
        """What cuBLAS takes for itself, out of torch's memory."""
        return 2 * (WORKSPACE_HOPPER if self.name.startswith(("h100", "h200", "b200")) else WORKSPACE)

    def takes(self, tensors: int, processes: int = 1) -> int:
        """What a process with so many bytes of tensors takes, one of so many."""
        own = CONTEXT + (NCCL if processes > 1 else 0)
        return int((tensors + self.workspaces) * (1 + FRAGMENTS)) + own

    def fits(self, tensors: int, processes: int = 1) -> bool:
        return self.takes(tensors, processes) <= self.nbytes


def gpu(text: str) -> Gpu:
    """The GPU that is meant: a name, or a size such as 24, 24GB or 23.5GiB."""
    name = text.strip().lower().replace("_", "-").replace(" ", "-")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:-?gi?b?)?", name)
    if found and float(found[1]) > 0:
        return Gpu(f"{found[1]} GB", int(float(found[1]) * GIB))
    if name in GPUS:
        return Gpu(name, GPUS[name] * GIB)
    near = difflib.get_close_matches(name, GPUS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"gpu: {text!r} is neither a size such as 24GB nor a GPU known here{hint}; {', '.join(GPUS)} are")
