"""How Triton kernels are launched: from explicit tables, never from a search at run time.

A kernel's file has its table of `Launch`es and says with `shipped()` which (kernel, configuration) pairs it
may launch. The ahead-of-time gate compiles exactly those, for chips that need not be there.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Set where no GPU is: kernels then run in Triton's interpreter, which knows no inline PTX.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


@dataclass(frozen=True)
class Launch:
    """Compile-time constants of a kernel, its warps, and the depth of its software pipeline."""

    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    resident: int = 2
    """Programs that a processor of a large GPU holds at once, where a kernel splits its work by that."""
    fp_fusion: bool = True
    """Whether a * b + c may become one operation that rounds once; not where the bits are defined."""

    def options(self, **constants: Any) -> dict[str, Any]:
        """What a launch takes beside a kernel's arguments; with constants that depend on these."""
        return {
            **self.constants,
            **constants,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
        }


def ceil_div(a: int, b: int) -> int:
    """How many pieces of b cover a."""
    return -(-a // b)


@dataclass(frozen=True)
class Shipped:
    """One kernel in one configuration, as it may be launched on chips of the given compute capabilities."""

    name: str
    """Kernel and configuration in words, unique among all that are shipped."""
    kernel: Any
    signature: Mapping[str, str]
    """Triton's type of each argument that is not a constant: "*bf16", "i32", ..."""
    launch: Launch
    aligned: tuple[str, ...] = ()
    """Arguments that are multiples of 16 in every launch, in bytes for pointers: what wide loads rest on."""
    weights_per_thread: float | None = None
    """Weights that a thread decodes in one round of the main loop (in all, without a loop); None: not counted."""
    instructions: Mapping[int, float] = field(default_factory=dict)
    """Recorded instructions per weight by compute capability (90: sm_90), which the gate holds."""
