"""A model shared by rows among the processes, by torch's FSDP2: the engine is torch's, what is a unit is said here.

Each block is a unit: its weights are put together before it runs and let go of after it, so that a process never has
more than a few blocks whole. What is left, the embedding with the last norm and the head (which may be the embedding
itself), is the root's, which stays whole from the beginning of forward to the end of backward. Codes are uint8
parameters, and shared as they are; adapters lie in the unit of their block. The float32 values of second-level scales
are buffers, whole on every process.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from models.model import Model, Stack
from models.parallel import world


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How a model is shared among processes."""

    cpu_offload: bool = False
    """Keep shares, gradients and optimizer states in the CPU's memory, and bring a block's weights over to run it."""
    mixed_precision: bool = False
    """Send adapters and other floating-point weights in the dtype that the model computes in, instead of their own."""


def shard(model: Model, device: torch.device, config: ShardConfig = ShardConfig()) -> None:
    """Let each process keep its rows of every parameter; buffers stay whole."""
    mesh = init_device_mesh(device.type, (world.size(),))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if config.mixed_precision:
        policy = MixedPrecisionPolicy(model.dtype, torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if config.cpu_offload else OffloadPolicy()
    for unit in [*units(model), model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients are summed: the loss is already divided by all labels
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    for name in model.entries:
        register_fsdp_forward_method(model, name)


def units(model: nn.Module) -> list[nn.Module]:
    """The blocks, in the order in which they are built."""
    return [block for stack in model.modules() if isinstance(stack, Stack) for block in stack.blocks]
