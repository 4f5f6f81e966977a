"""Loss on examples that training did not see, over the same labels that training would learn from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.dealing import dealt
from eval.mode import evaluating
from models import Model
from models.parallel import world


@dataclass(frozen=True)
class HeldOut:
    """Mean cross-entropy in nats per label token, and how many there were."""

    loss: float
    tokens: int


@torch.inference_mode()
def held_out_loss(model: Model, batches: Iterable[Mapping[str, Tensor]]) -> HeldOut:
    """The mean over all label tokens of all batches, in evaluation mode; the mode is restored.

    Several processes compute a part of the batches each, and all of them get the mean of all.
    """
    total, tokens = 0.0, 0
    with evaluating(model):
        counted = ((batch, model.label_count(batch["labels"])) for batch in batches)
        for (batch, count), mine in dealt((batch, count) for batch, count in counted if count):
            loss = model.loss(**{k: v.to(model.device) for k, v in batch.items()}).item()
            if mine:
                total, tokens = total + loss * count, tokens + count
    total, tokens = world.sums(total, tokens)
    if tokens == 0:
        raise ValueError("no label to score in any held-out example")
    return HeldOut(total / tokens, int(tokens))
