"""One step of the optimizer: accumulated so that every label token counts alike, checked, clipped, made.

The loss of a step is the sum over all its label tokens divided by their number, exactly what one big batch
would give. Averaging the micro-batches' means instead, as is often done, would weigh a token of a short
answer more than one of a long answer.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from models.errors import ConfigError, DataError
from train.data.batches import Batch
from train.paged.fused import FusedOptimizer


class Step(NamedTuple):
    """What one step of the optimizer went over."""

    loss: float
    grad_norm: float
    """Norm of all gradients together, before clipping."""
    labels: int
    tokens: int


class BrokenStep(Exception):
    """A step whose loss or gradient is not finite; nothing has moved, and the gradients are still there."""

    def __init__(self, number: int, loss: float, grad_norm: float) -> None:
        super().__init__(f"step {number}: the loss is {loss} and the gradient norm {grad_norm}")
        self.number, self.loss, self.grad_norm = number, loss, grad_norm


def update(
    model: Any,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    number: int,
    max_grad_norm: float,
) -> Step:
    """Make step `number`, counted from 1, at the learning rate that the optimizer has.

    A loss or gradient that is not finite is a BrokenStep before any parameter has moved.
    """
    device = next(iter(parameters.values())).device
    counts = [int(model.label_count(batch.inputs["labels"])) for batch in micro_batches]
    labels = sum(counts)
    if not labels:
        raise DataError(f"step {number}: none of its {len(micro_batches)} batches has a label token to learn from")

    loss = torch.zeros((), device=device)
    for batch, count in zip(micro_batches, counts, strict=True):
        if count:  # the mean over no label would be nan
            part = model.loss(**batch.to(device).inputs).float() * (count / labels)
            part.backward()
            loss += part.detach()

    if number == 1:
        check_all_reached(parameters)
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    step = Step(loss.item(), norm.item(), labels, sum(batch.tokens for batch in micro_batches))
    if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
        raise BrokenStep(number, step.loss, step.grad_norm)
    if number == 1:
        check_all_moved(parameters)

    nn.utils.clip_grads_with_norm_(parameters.values(), max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return step


def dry_step(model: Any, parameters: dict[str, nn.Parameter], optimizer: FusedOptimizer, batch: Batch) -> None:
    """Take the memory that a step on this batch takes, and change nothing.

    What a step has beside the batch is there too: the optimizer's states, and gradients from the micro-batches before.
    """
    optimizer.cover(list(parameters.values()))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    device = next(iter(parameters.values())).device
    model.loss(**batch.to(device).inputs).backward()
    optimizer.zero_grad(set_to_none=True)


def check_all_reached(parameters: dict[str, nn.Parameter]) -> None:
    """Refuse to go on if the loss does not depend on some of what should be trained.

    Presence is what counts: LoRA's A has a zero gradient as long as B is zero.
    """
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    if missing:
        raise ConfigError(
            f"step 1: {len(missing)} of {len(parameters)} trainable parameters got no gradient: {some(missing)}; "
            f"the loss does not depend on them, so leave them out of lora.target_modules"
        )


def check_all_moved(parameters: dict[str, nn.Parameter]) -> None:
    """Refuse to go on if a lora_B, by which its branch begins, has a gradient of zeros: it would never learn."""
    branches = {name: parameter for name, parameter in parameters.items() if ".lora_B." in name}
    still = [name for name, b in branches.items() if b.grad is not None and not bool(b.grad.any())]
    if still:
        raise ConfigError(
            f"step 1: the gradient of {len(still)} of {len(branches)} lora_B is zero: {some(still)}; nothing that "
            f"they add reaches the loss, so leave them out of lora.target_modules"
        )


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
