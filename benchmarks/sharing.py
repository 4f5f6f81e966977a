"""A model that FSDP2 shares among the processes of a world of one: what it costs, and does it compute the same?

With one process nothing is sent and torch gathers nothing, but the rest takes its usual way: parameters are DTensors,
blocks are put together and let go of by hooks, shares are brought over from the CPU if they are kept there, gradients
go back to them, and the optimizer moves local tensors. So a single GPU shows whether that works on a GPU.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.timing import interleaved, stopwatch
from benchmarks.training import Setting, Stepper, finished, ours
from models.parallel import shares
from models.parallel.shard import ShardConfig, shard
from train.passes import Sharded

WAYS = {
    "shared": ShardConfig(),
    "CPU offload": ShardConfig(cpu_offload=True),
}
ALLOWED = 1e-5
"""Largest difference, relative to the loss and to the norm of a gradient."""


def measure(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """A row for each way: how far loss and gradients are from those of a model that is not shared, and both times."""
    setting = dataclasses.replace(setting, dropout=0.0)
    rows = []
    with world_of_one(setting.device):
        for name, config in WAYS.items():
            steps = {"whole": Stepper(ours(setting), setting), "shared": shared(setting, config)}
            (loss, expected), (same, gradients) = (outcome(step) for step in steps.values())
            error = max(float((gradients[n] - g).norm() / g.norm().clamp_min(1e-12)) for n, g in expected.items())
            times = interleaved(steps, repeats, lambda work: stopwatch(finished(work, setting.device)))
            rows.append(
                {
                    "way": name,
                    "loss_difference": abs(same - loss),
                    "gradient_error": error,
                    "right": error <= ALLOWED and abs(same - loss) <= ALLOWED * abs(loss),
                    **{f"{who}_seconds": t.median for who, t in times.items()},
                }
            )
            del steps
    return rows


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What is not the same, in words."""
    return [
        f"{row['way']}: loss differs by {row['loss_difference']:.3g}, gradients by {row['gradient_error']:.3g}"
        for row in rows
        if not row["right"]
    ]


@contextmanager
def world_of_one(device: str) -> Iterator[None]:
    """A process group that this process has for itself."""
    backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shared(setting: Setting, config: ShardConfig) -> Stepper:
    model = ours(setting)
    shard(model, torch.device(setting.device), config)
    return Stepper(model, setting, Sharded)


def outcome(step: Stepper) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and the gradients on the CPU, which the step then forgets."""
    passes = step.passes
    loss = passes.backward(step.batch, 1.0, last=True).item()
    gradients = {n: shares.local(p.grad).float().cpu() for n, p in passes.parameters.items() if p.grad is not None}
    passes.zero_grad()
    return loss, gradients
