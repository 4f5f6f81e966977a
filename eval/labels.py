"""What a model that labels texts gives for held-out ones, and how far that agrees with their labels."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from eval.glue.metrics import MEASURES, UndefinedScore
from models.roberta import Roberta


@dataclass(frozen=True)
class Predictions:
    """Logits and labels of some texts, on the CPU in the order they came in, and the mean loss."""

    logits: Float[Tensor, "texts labels"]
    labels: Shaped[Tensor, " texts"]
    loss: float


@torch.inference_mode()
def predict(model: Roberta, batches: Iterable[Mapping[str, Tensor]]) -> Predictions:
    """What the model gives for each text that has a label, in evaluation mode; the mode is restored."""
    assert model.classifier is not None
    training = model.training
    model.eval()
    logits, labels = [], []
    for batch in batches:
        inputs = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
        labelled = batch["labels"] != -100
        logits.append(model(**inputs).float().cpu()[labelled])
        labels.append(batch["labels"][labelled])
    model.train(training)
    if not sum(map(len, labels)):
        raise ValueError("no label to score in any held-out example")
    joined = torch.cat(logits), torch.cat(labels)
    return Predictions(*joined, model.classifier.score(*joined).item())


def agreement(found: Predictions, measures: Sequence[str]) -> dict[str, float]:
    """How far predictions agree with labels, by the names of `eval/glue/metrics.py`; nothing where there is no loss.

    A measure that has no value is 0 without a word: a head that is new often answers all texts alike.
    """
    if not math.isfinite(found.loss):
        return {}
    predictions = found.logits[:, 0] if found.logits.shape[1] == 1 else found.logits.argmax(dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedScore)
        return {name: MEASURES[name](found.labels.numpy(), predictions.numpy()) for name in measures}
