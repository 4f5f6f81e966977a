"""One step of the optimizer: accumulated so that every label token counts alike, checked, clipped, made.

The loss of a step is the sum over all its label tokens divided by their number, exactly what one big batch
would give. Averaging the micro-batches' means instead, as is often done, would weigh a token of a short
answer more than one of a long answer. Several processes count the label tokens of all of them before their first pass,
and what is said of a step is the same on each: its loss, its norm, and whether it is made at all.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from models.errors import ConfigError, DataError
from models.parallel import world
from train.data.batches import Batch
from train.paged.fused import FusedOptimizer
from train.passes import Passes
from train.seed import seed_step


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
    passes: Passes,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    number: int,
    max_grad_norm: float,
    seed: int | None = None,
) -> Step:
    """Make step `number`, counted from 1, at the learning rate that the optimizer has.

    `micro_batches` are those of this process, as many on each; with a `seed` each draws from one of its own. A loss or
    gradient that is not finite is a BrokenStep before any parameter has moved.
    """
    counts = [int(passes.model.label_count(batch.inputs["labels"])) for batch in micro_batches]
    labels, tokens = map(int, world.sums(sum(counts), sum(batch.tokens for batch in micro_batches)))
    if not labels:
        (last,) = world.most(max(batch.number for batch in micro_batches))
        raise DataError(f"step {number}: none of its {last + 1:.0f} batches has a label token to learn from")

    loss = torch.zeros((), device=passes.device)
    for place, (batch, count) in enumerate(zip(micro_batches, counts, strict=True), 1):
        if not count and world.size() == 1:
            continue  # the mean over no label would be nan
        if seed is not None:
            seed_step(seed, number, batch.number)
        loss += passes.backward(batch if count else batch.stand_in(), count / labels, place == len(micro_batches))

    if number == 1:
        check_all_reached(passes.parameters)
    passes.finish()
    norm = passes.norm()
    (total,) = world.sums(loss.item())
    step = Step(total, norm.item(), labels, tokens)
    if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm)):
        raise BrokenStep(number, step.loss, step.grad_norm)
    if number == 1:
        check_all_moved(passes.moved)

    nn.utils.clip_grads_with_norm_(passes.moved.values(), max_grad_norm, norm)
    optimizer.step()
    passes.zero_grad()
    return step


def dry_step(passes: Passes, optimizer: FusedOptimizer, batch: Batch) -> None:
    """Take the memory that a step on this batch takes, and change nothing.

    What a step has beside the batch is there too: the optimizer's states, and gradients from the micro-batches before.
    """
    optimizer.cover(list(passes.moved.values()))
    for parameter in passes.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    passes.try_backward(batch)
    passes.zero_grad()


def check_all_reached(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse to go on if the loss does not depend on some of what should be trained.

    Presence is what counts: LoRA's A has a zero gradient as long as B is zero.
    """
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    if missing:
        raise ConfigError(
            f"step 1: {len(missing)} of {len(parameters)} trainable parameters got no gradient: {some(missing)}; "
            f"the loss does not depend on them, so leave them out of lora.target_modules"
        )


def check_all_moved(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse to go on if a lora_B, by which its branch begins, has a gradient of zeros: it would never learn.

    Of a shared one some rows may have such a gradient, and all that a process has.
    """
    branches = {name: b.grad for name, b in parameters.items() if ".lora_B." in name}
    moved = world.most(*(grad is None or bool(grad.any()) for grad in branches.values()))
    still = [name for name, has_moved in zip(branches, moved, strict=True) if not has_moved]
    if still:
        raise ConfigError(
            f"step 1: the gradient of {len(still)} of {len(branches)} lora_B is zero: {some(still)}; nothing that "
            f"they add reaches the loss, so leave them out of lora.target_modules"
        )


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
