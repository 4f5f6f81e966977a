"""A model shared by rows among the processes, by torch's FSDP2: the engine is torch's, what is a unit is said here.

Each block is a unit: its weights are put together before it runs and let go of after it, so that a process never has
more than a few blocks whole. What is left, the embedding with the last norm and the head (which may be the embedding
itself), is the root's, which stays whole from the beginning of forward to the end of backward. (Where one of a model's
entries calls another, as the loss of T5 and RoBERTa does, torch lets go of it after forward and gathers it once more.)
Codes are uint8 parameters, and shared as they are; adapters lie in the unit of their block. The float32 values of
second-level scales are buffers, whole on every process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from models.errors import ConfigError
from models.model import Model, Stack
from models.parallel import shares, world


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How a model is shared among processes."""

    cpu_offload: bool = False
    """Keep shares, gradients and optimizer states in the CPU's memory, and bring a block's weights over to run it."""
    mixed_precision: bool = False
    """Send adapters and other floating-point weights in the dtype that the model computes in, instead of their own."""


def shard(model: Model, device: torch.device, config: ShardConfig = ShardConfig()) -> None:
    """Let each process keep its rows of every parameter; buffers stay whole.

    A model without memory stays so, and then has shares without memory.
    """
    # Half a second of imports, that most programs need not wait for.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    if config.mixed_precision:
        refuse_narrow_lengths(model)
    mesh = init_device_mesh(device.type, (world.size(),))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if config.mixed_precision:
        policy = MixedPrecisionPolicy(model.dtype, torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if config.cpu_offload else OffloadPolicy()
    parts = [*units(model), model]
    for unit in parts:
        with parameters_frozen_at_first():
            fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload)
        for name in getattr(unit, "entries", ()):
            register_fsdp_forward_method(unit, name)
        assert isinstance(unit, FSDPModule)
        unit.set_force_sum_reduction_for_comms(True)  # gradients are summed: the loss is already divided by all labels
        unit.set_gradient_divide_factor(1.0)
    if not any(parameter.is_meta for parameter in model.parameters()):
        put_together_once(model)


@contextmanager
def parameters_frozen_at_first() -> Iterator[None]:
    """While entered, `nn.Parameter(data)` is one without a gradient unless it is told otherwise.

    FSDP2 of torch 2.11 makes its parameters with one, which codes cannot have, and corrects that in its next line.
    """
    new = nn.Parameter.__new__
    before = new.__defaults__
    assert before == (None, True), "nn.Parameter(data=None, requires_grad=True) is what is to be changed"
    new.__defaults__ = (None, False)
    try:
        yield
    finally:
        new.__defaults__ = before


def units(model: nn.Module) -> list[nn.Module]:
    """The blocks, in the order in which they are built, each after what in it is not its own alone."""
    stacks = [stack for stack in model.modules() if isinstance(stack, Stack)]
    return [unit for stack in stacks for unit in (*stack.common, *stack.blocks)]


def put_together_once(model: nn.Module) -> None:
    """Let FSDP make the tensors that it puts weights together in, which it keeps, without their memory.

    Made in the first evaluation, under torch.inference_mode, they could never be trained with.
    """
    for module in shares.engaged(model):
        codes = {name: p.dtype for name, p in module.named_parameters() if not p.is_floating_point()}
        module.unshard()
        sent = {name: module.get_parameter(name).dtype for name in codes}
        module.reshard()
        if sent != codes:  # as torch 2.11 does, and nothing would complain: it would be another model
            wrong = next(name for name in codes if sent[name] != codes[name])
            raise ConfigError(
                f"fsdp.mixed_precision: torch {torch.__version__} makes {sent[wrong]} of the codes in {wrong} as well; "
                "leave it out, or install torch 2.13"
            )


def refuse_narrow_lengths(model: Model) -> None:
    """Steps of training are far below the last digit of a length in 16 bits, or of a factor near 1: forward would not
    see those of DoRA or IA3.
    """
    lengths = [n for n, _ in model.named_parameters() if n.endswith(("lora_magnitude_vector", "ia3_l"))]
    if lengths and model.dtype.itemsize < 4:
        raise ConfigError(
            f"fsdp.mixed_precision would round DoRA's lengths or IA3's vectors ({lengths[0]} and {len(lengths) - 1} "
            f"more) to {str(model.dtype).removeprefix('torch.')}, and they are learned in float32; "
            "turn one of the two off"
        )
