"""What a model that labels texts gives for held-out ones, and how far that agrees with their labels."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from eval.dealing import dealt, in_order
from eval.glue.metrics import MEASURES, UndefinedScore
from eval.labelling import logits_of
from eval.mode import evaluating
from models.parallel import world
from models.roberta import Roberta


@dataclass(frozen=True)
class Predictions:
    """Logits and labels of some texts, on the CPU in the order they came in, and the mean loss."""

    logits: Float[Tensor, "texts labels"]
    labels: Shaped[Tensor, " texts"]
    loss: float


@torch.inference_mode()
def predict(model: Roberta, batches: Iterable[Mapping[str, Tensor]]) -> Predictions:
    """What the model gives for each text that has a label, in evaluation mode; the mode is restored.

    Several processes ask for a part of the batches each, and all of them get everything.
    """
    assert model.classifier is not None
    made = []
    with evaluating(model):
        for batch, mine in dealt(batches):
            inputs = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
            logits, labelled = logits_of(model, **inputs), batch["labels"] != -100
            if mine:
                made.append((logits[labelled], batch["labels"][labelled]))
        found = in_order(world.from_all(made))
        if not sum(len(labels) for _, labels in found):
            raise ValueError("no label to score in any held-out example")
        logits, labels = torch.cat([it for it, _ in found]), torch.cat([it for _, it in found])
        return Predictions(logits, labels, model.classifier.score(logits, labels).item())


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
