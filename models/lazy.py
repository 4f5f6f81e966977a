"""A model whose block linears stay on disk: each is read when it is used, and let go again.

It computes what the loaded model computes, in the memory of its embeddings, its head and one layer. That is
how a written 16-bit checkpoint can be checked on a machine that holds the 4-bit model and not the 16-bit one.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import linear_weights, matched, open_checkpoint, place, skeleton
from models.errors import CheckpointError
from models.linear import Linear
from models.model import Model
from models.readers import Reader


def load_lazily(path: str | Path, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu") -> Model:
    """The model of a checkpoint in 16 or 32 bits, in evaluation mode; its file must stay where it is."""
    raw, reader, where = open_checkpoint(path)
    model = skeleton(raw, where, reader)
    source = matched(model, reader)
    if source.stored:
        raise CheckpointError(f"{where}: is quantized; layers are read lazily from a 16-bit checkpoint")
    linears = linear_weights(model)
    for name, parameter in list(model.named_parameters()):
        if name not in linears:
            value = source.fresh[name] if name in source.fresh else source.reader.read(name)
            place(model, name, value.to(device, dtype))
        else:
            layer = model.get_submodule(name.removesuffix(".weight"))
            layer.register_forward_pre_hook(partial(read_weight, source.reader, name, torch.device(device), dtype))
            layer.register_forward_hook(partial(drop_weight, parameter))
    model.source = Path(path)
    return model.eval()


def read_weight(
    reader: Reader, name: str, device: torch.device, dtype: torch.dtype, layer: nn.Module, inputs: Any
) -> None:
    assert isinstance(layer, Linear)
    layer.weight = nn.Parameter(reader.read(name).to(device, dtype), requires_grad=False)


def drop_weight(nothing: nn.Parameter, layer: nn.Module, inputs: Any, output: Tensor) -> None:
    """Put the weight without memory back in its place."""
    assert isinstance(layer, Linear)
    layer.weight = nothing
