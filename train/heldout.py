"""The loss on examples that are not trained on, weighted as in training: every label token counts alike."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from models.errors import DataError


def heldout_loss(
    model: Any, batches: Iterable[Mapping[str, Tensor]], device: torch.device | str = "cpu"
) -> dict[str, int | float]:
    """Give {"loss", "labels"}: the mean over all label tokens of the batches, and their number.

    Dropout is off meanwhile; the model goes back to the mode it was in.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            total, labels = 0.0, 0
            for batch in batches:
                count = int(model.label_count(batch["labels"]))
                if count:
                    moved = {name: tensor.to(device) for name, tensor in batch.items()}
                    total += model.loss(**moved).item() * count
                    labels += count
    finally:
        model.train(was_training)
    if not labels:
        raise DataError(
            "the held-out examples have no label token, so they have no loss; check data.eval_size"
        )
    return {"loss": total / labels, "labels": labels}
