"""A model that labels texts: with the head that its checkpoint has, where that gives as many labels, or a new one.

What the labels are called belongs to the data; the model's config takes their names, so that a saved model says them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from models.checkpoint import Preparing, describe, load, unprepared
from models.errors import CheckpointError
from models.model import Model
from models.parallel import shares
from models.roberta import Roberta
from models.whole import trained_parameter
from nf4 import QuantConfig

HEADS = ("classification", "regression")


def load_labelled(
    path: str | Path,
    head: str,
    labels: Sequence[str] = (),
    quant: QuantConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    prepare: Preparing = unprepared,
    loading: Callable[..., Model] = load,
) -> Roberta:
    """The model with a head of these classes, or for one number; a new head draws from torch's global generator.

    A head of the same classes in another order is put into this one: a checkpoint may count them in another way than
    the data does. `loading` is `load` or what does the same.
    """
    count = len(labels) if head == "classification" else 1
    new = describe(path).labels != count

    def in_order(model: Model) -> Callable[[], None]:
        start = prepare(model)

        def fill() -> None:
            if not new:
                reorder(labelling(model), labels)
            start()

        return fill

    model = labelling(loading(path, quant, dtype, device, head, count, new_head=new, prepare=in_order))
    if labels:
        model.config = replace(model.config, labels=tuple(labels))
    return model


def labelling(model: Model) -> Roberta:
    """The model as one that labels texts."""
    if not isinstance(model, Roberta) or model.classifier is None:
        raise CheckpointError(f"labels are given by a RoBERTa with a classification head, not {type(model).__name__}")
    return model


@torch.no_grad()
def reorder(model: Roberta, labels: Sequence[str]) -> None:
    """Put the logits into the order of these labels, if they are the model's in another one."""
    theirs = model.config.labels
    if theirs == tuple(labels) or set(theirs) != set(labels):
        return
    rows = [theirs.index(label) for label in labels]
    for leaf in ("weight", "bias"):
        parameter = trained_parameter(model, f"classifier.out_proj.{leaf}")
        shares.put(parameter, shares.gathered(parameter)[rows])
