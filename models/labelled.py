"""A model that labels texts: with the head that its checkpoint has, where that gives as many labels, or a new one.

What the labels are called belongs to the data; the model's config takes their names, so that a saved model says them.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from models.checkpoint import describe, load
from models.errors import CheckpointError
from models.model import Model
from models.roberta import Roberta
from nf4 import QuantConfig

HEADS = ("classification", "regression")


def load_labelled(
    path: str | Path,
    head: str,
    labels: Sequence[str] = (),
    quant: QuantConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
) -> Roberta:
    """The model with a head of these classes, or for one number; a new head draws from torch's global generator.

    A head of the same classes in another order is put into this one: a checkpoint may count them in another way than
    the data does.
    """
    count = len(labels) if head == "classification" else 1
    new = describe(path).labels != count
    model = labelling(load(path, quant, dtype, device, head, count, new_head=new))
    if labels:
        if not new and model.config.labels != tuple(labels) and set(model.config.labels) == set(labels):
            reorder(model, [model.config.labels.index(label) for label in labels])
        model.config = replace(model.config, labels=tuple(labels))
    return model


def labelling(model: Model) -> Roberta:
    """The model as one that labels texts."""
    if not isinstance(model, Roberta) or model.classifier is None:
        raise CheckpointError(f"labels are given by a RoBERTa with a classification head, not {type(model).__name__}")
    return model


def reorder(model: Roberta, rows: list[int]) -> None:
    """Put the logits into another order."""
    assert model.classifier is not None
    out = model.classifier.out_proj
    for name, value in list(out.named_parameters()):
        setattr(out, name, nn.Parameter(value.detach()[rows]))
