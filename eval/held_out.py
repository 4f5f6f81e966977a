"""Loss on examples that training did not see, over the same labels that training would learn from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models import Model


@dataclass(frozen=True)
class HeldOut:
    """Mean cross-entropy in nats per label token, and how many there were."""

    loss: float
    tokens: int


@torch.inference_mode()
def held_out_loss(model: Model, batches: Iterable[Mapping[str, Tensor]]) -> HeldOut:
    """The mean over all label tokens of all batches, in evaluation mode; the mode is restored."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        count = model.label_count(batch["labels"])
        if count:
            total += model.loss(**{k: v.to(model.device) for k, v in batch.items()}).item() * count
            tokens += count
    model.train(training)
    if tokens == 0:
        raise ValueError("no label to score in any held-out example")
    return HeldOut(total / tokens, tokens)
