"""What a measurement is held against: the figures to reach, and whether it does.

A figure is a ratio of times ("vs_bitsandbytes": our time over theirs, so less is better), a time, or a share of
what the machine can do at most ("bandwidth_share", of the bandwidth of a plain copy, so more is better).
"""

from collections.abc import Mapping
from typing import Any

AT_LEAST = ("bandwidth_share", "speed_ratio")  # every other figure must be at most its target

Targets = Mapping[str, float]

CPU: dict[str, Targets] = {  # weight 4096 x 4096, NF4 with double quantization, bfloat16
    "quantize": {"vs_bitsandbytes": 0.15},
    "dequantize": {"vs_bitsandbytes": 0.30},
    "matmul M=1": {"vs_bitsandbytes": 0.12, "vs_dense": 0.9},
    "matmul M=16": {"vs_bitsandbytes": 0.40},
    "matmul M=512": {"vs_bitsandbytes": 0.65, "vs_dense": 1.3},
    "LoRA forward and backward M=1024": {"vs_bitsandbytes": 0.6},
    "quantize by search": {"seconds": 3.0},
}
GPU: dict[str, Targets] = {  # an H100; 4096 x 4096 and 11008 x 4096
    "dequantize": {"bandwidth_share": 0.85},
    **{f"matmul M={m}": {"bandwidth_share": 0.5, "vs_bitsandbytes": 1.0} for m in (1, 2, 4, 8, 16)},
    "matmul M=32": {"vs_bitsandbytes": 1.0},
    "matmul M=64": {"vs_bitsandbytes": 1.0, "vs_dense": 1 / 1.5},
    "LoRA forward and backward M=4096": {"vs_dense": 1 / 0.85},
}
TRAINING: Targets = {"speed_ratio": 2.0, "peak_ratio": 0.6, "peak_above_start_ratio": 0.6}


def judged(row: Mapping[str, Any], targets: Targets) -> dict[str, Any]:
    """The row with each target that its figures can be held against, and whether it is met."""
    held = {}
    for name, target in targets.items():
        if name in row:
            met = row[name] >= target if name in AT_LEAST else row[name] <= target
            held[name] = {"target": target, "met": met}
    return {**row, "targets": held}


def against(seconds: Mapping[str, float]) -> dict[str, float]:
    """Our time over each other contestant's."""
    return {f"vs_{name}": seconds["ours"] / other for name, other in seconds.items() if name != "ours"}


def verdicts(row: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Each figure that is held against a target: its name, itself, the target, and "met" or "missed"."""
    told = []
    for name, held in row["targets"].items():
        sign = "≥" if name in AT_LEAST else "≤"
        told.append((name, f"{row[name]:.3g}", f"{sign} {held['target']:.3g}", "met" if held["met"] else "missed"))
    return told
