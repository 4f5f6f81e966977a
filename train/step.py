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

from models.errors import ConfigError, DataError, NonFiniteError
from train.data.batches import Batch


class Step(NamedTuple):
    """What one step of the optimizer went over."""

    loss: float
    grad_norm: float
    """Norm of all gradients together, before clipping."""
    labels: int
    tokens: int


def update(
    model: Any,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    number: int,
    max_grad_norm: float,
) -> Step:
    """Make step `number`, counted from 1, at the learning rate that the optimizer has.

    A loss or gradient that is not finite is refused before any parameter has moved.
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
        raise NonFiniteError(non_finite(number, step, parameters))

    nn.utils.clip_grads_with_norm_(parameters.values(), max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return step


def check_all_reached(parameters: dict[str, nn.Parameter]) -> None:
    """Refuse to go on if the loss does not depend on some of what should be trained.

    Presence is what counts: LoRA's A has a zero gradient as long as B is zero.
    """
    missing = [name for name, parameter in parameters.items() if parameter.grad is None]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ConfigError(
            f"step 1: {len(missing)} of {len(parameters)} trainable parameters got no gradient: {shown}; "
            f"the loss does not depend on them, so leave them out of lora.target_modules"
        )


def non_finite(number: int, step: Step, parameters: dict[str, nn.Parameter]) -> str:
    """Say what is not finite, and in which parameter first."""
    broken = [n for n, p in parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
    where = f"; first parameter with such a gradient: {broken[0]} ({len(broken)} in all)" if broken else ""
    return (
        f"step {number}: the loss is {step.loss} and the gradient norm {step.grad_norm}{where}. "
        f"The parameters are still those of step {number - 1}. "
        f'Try a lower optimizer.learning_rate, or dtype = "float32"'
    )
