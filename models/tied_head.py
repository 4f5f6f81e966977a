"""A head that is its embedding, in adapter files: trained with it, it is in the file under both names.

Here such a model has one parameter. PEFT has two modules, and keeps them one only where it is told to and finds both
in the file; otherwise it trains the embedding and leaves the head as it was. That is another model, which one
parameter cannot be: such a file is refused.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from models.errors import CheckpointError
from models.model import Model
from models.readers import Reader

HEADS = ("lm_head.weight", "lm_head.decoder.weight")


def with_tied_heads(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file has to hold where these tensors, by the model's names, are to be written: heads as well."""
    heads = {head: tensors[name].clone() for head, name in tied_heads(model, tensors).items()}
    return {**tensors, **heads}


def tied_heads(model: nn.Module, parameters: Collection[str]) -> dict[str, str]:
    """The names of a head that released files have for some of these parameters, each with the parameter."""
    found = {}
    for head in HEADS:
        ours = model.parameter_named(head) if isinstance(model, Model) else head
        if ours is not None and ours != head and ours in parameters:
            found[head] = ours
    return found


def refuse_untied(reader: Reader, model: nn.Module) -> None:
    """Refuse a file in which a head that is its embedding is without it, or with another one."""
    named = dict(model.named_parameters())
    for head, embedding in tied_heads(model, named).items():
        found = [name for name in (head, embedding) if name in reader.shapes]
        if not found or (len(found) == 2 and torch.equal(reader.read(head), reader.read(embedding))):
            continue
        raise CheckpointError(
            f"{reader.where(found[0])}: {' and '.join(found)} {'differ' if len(found) == 2 else 'was trained alone'}, "
            f"but in this model {head} is {embedding}; the adapter was made with the two apart"
        )
