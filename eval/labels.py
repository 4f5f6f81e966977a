"""What a model that labels texts gives for held-out ones, and how far that agrees with their labels."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

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


def accuracy(logits: Float[Tensor, "texts labels"], labels: Int[Tensor, " texts"]) -> float:
    """Share of the texts whose largest logit is that of their class."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def pearson(values: Float[Tensor, " texts"], labels: Shaped[Tensor, " texts"]) -> float:
    """Pearson's correlation in float64; 0 where one side is constant, which tells nothing of the other."""
    if any(bool((side == side[0]).all()) for side in (values, labels)):
        return 0.0
    x, y = (side.double() - side.double().mean() for side in (values, labels))
    return (x @ y / (torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y))).clamp(-1, 1).item()
