"""Loading a model of which each process keeps a share, and reads little more than that.

The model is built without memory, its linear layers with room for codes, its adapters in their places, and is shared
while it is nothing but shapes. Then its shares are filled. Of weights that are in the file as they will be kept, each
process reads its own rows. What has to be whole first, to be quantized or decoded, is read by one process, each
weight by another, and dealt out. So every process reads about its share of the file, and has beside its share of the
model no more than a few copies of the largest tensor. All of it is bit for bit what `models.load` gives.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint import (
    Preparing,
    Values,
    check_dense,
    load,
    opened,
    place,
    record,
    refuse_non_finite,
    unprepared,
)
from models.linear import NF4Linear
from models.model import Model
from models.parallel import shares, world
from models.parallel.agreement import agreed, by_turns
from models.parallel.shard import ShardConfig, put_together_once, shard
from models.readers import Reader
from models.whole import trained_parameter
from nf4 import QuantConfig, QuantizedTensor
from nf4.sizes import without_memory
from nf4.storage import read_config

Loading = Callable[..., Model]


def loading(distributed: str, config: ShardConfig) -> Loading:
    """How this process loads a model: `models.load`, or with others, if `distributed` is "fsdp", its share alone."""
    return partial(load_shared, config=config) if distributed == "fsdp" and world.size() > 1 else load


def load_shared(
    path: str | Path,
    quant: QuantConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    head: str | None = None,
    num_labels: int | None = None,
    new_head: bool = False,
    prepare: Preparing = unprepared,
    *,
    config: ShardConfig = ShardConfig(),
) -> Model:
    """This process's share of what `models.load` gives; all processes have to load it."""
    device = torch.device(device)
    with agreed():
        model, values = opened(path, quant, dtype, head, num_labels, new_head)
        for name, shape in values.shapes.items():
            place(model, name, room(values, name, shape))
        start = prepare(model)
    shard(model, device, config)
    model.to_empty(device="cpu" if config.cpu_offload else device)
    fill(model, values, device)
    model.eval()
    start()
    put_together_once(model)
    return model


def room(values: Values, name: str, shape: tuple[int, ...]) -> Tensor | QuantizedTensor:
    """What a parameter will be, without memory."""
    quant = values.quant if values.quantizes(name) else None
    if name in values.stored and name in values.linears:
        with values.blaming(name):
            quant = read_config(record(values.reader, values.stored[name]), name)
    if quant is None:
        return torch.empty(shape, dtype=values.dtype, device="meta")
    return without_memory(shape, values.dtype, quant)


@torch.no_grad()
def fill(model: Model, values: Values, device: torch.device) -> None:
    """Give every parameter of a shared model its values, and every buffer of stored weights."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NF4Linear)}
    for layer in layers.values():
        for name, scale in layer.named_buffers(recurse=False):
            setattr(layer, name, torch.empty_like(scale, device=device))  # computed with on the device, wherever kept
    to_be_made = [name for name in values.shapes if made_whole(values, name)]

    def take(name: str, value: Tensor | QuantizedTensor | None, source: int | None = None) -> None:
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            shares.put(trained_parameter(model, name), value, source)  # pyrefly: ignore[bad-argument-type]
        else:
            layer.refill(value, source)  # pyrefly: ignore[bad-argument-type]

    with agreed():
        for name in (name for name in values.shapes if not made_whole(values, name)):
            with values.blaming(name):
                if name in values.fresh:
                    take(name, values.fresh[name].to(values.dtype))
                elif name in values.stored:
                    take(name, own_codes(values, name, layers[name.removesuffix(".weight")]))
                else:
                    shares.local(trained_parameter(model, name)).copy_(own_rows(values, name))
    by_turns(to_be_made, lambda name: values.make(name, device).stored, take)


def made_whole(values: Values, name: str) -> bool:
    """Has the whole weight to be there, to be quantized or decoded?"""
    return values.quantizes(name) or (name in values.stored and name not in values.linears)


def own_rows(values: Values, name: str) -> Tensor:
    """This process's rows of a weight that stays dense."""
    kept = shares.rows(values.shapes[name][0])
    weight = check_dense(name, values.reader.read_rows(name, kept.start, kept.stop)).to(values.dtype)
    refuse_non_finite(weight, name, kept.start)
    return weight


def own_codes(values: Values, name: str, layer: NF4Linear) -> QuantizedTensor:
    """A weight that the file has in 4 bits, with zeros for what belongs to other processes: those are codes as well."""
    divided = {name: layer.weight, f"{name}.absmax": layer.absmax_codes}
    tensors = {}
    for part in values.stored[name]:
        parameter = divided.get(part)
        if parameter is None:
            tensors[part] = values.reader.read(part)
        else:
            tensors[part] = own_among_zeros(values.reader, part, len(parameter))
    return values.as_stored(name, tensors)


def own_among_zeros(reader: Reader, name: str, count: int) -> Tensor:
    """A tensor of a file that is for a parameter of `count` rows, with zeros but for those of this process."""
    shape = reader.shapes[name]
    if not shape or not count or shape[0] % count:  # to be refused, or too odd to be cut
        return reader.read(name)
    kept, each = shares.rows(count), shape[0] // count
    own = reader.read_rows(name, kept.start * each, kept.stop * each)
    whole = own.new_zeros(shape)
    whole[kept.start * each : kept.stop * each] = own
    return whole
