"""LoRA: a trained low-rank branch beside a frozen linear layer, y = x W^T + scaling (x A^T) B^T.

A (rank, in) starts Kaiming-uniform and B (out, rank) zero, so that training starts from the base model
exactly (`models/lora_init.py` has other starts). Only A and B are trained, with DoRA the lengths of the merged
weight's rows, and what `modules_to_save` names. Hu et al. 2021; Dettmers et al. 2023 put one on every linear layer of
the blocks, which is the default here and what it takes to match full fine-tuning.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.attachment import Attachment, adapted_layers, freeze, record, refuse_second
from models.dora import ratio
from models.linear import AdaptableLinear
from models.lora_config import ADAPTER_DTYPES, LoraConfig
from models.lora_init import divided, starting_weights, take
from models.parallel import shares
from models.parallel.agreement import by_turns
from models.whole import computed_parameter, saved_parameters, train_whole, within


def attach_lora(model: nn.Module, config: LoraConfig = LoraConfig()) -> None:
    """Give the layers that `config` names an adapter each, and freeze everything else.

    What is wrong with the configuration is found before the model is changed.
    """
    prepare_lora(model, config)()


def prepare_lora(model: nn.Module, config: LoraConfig = LoraConfig()) -> Callable[[], None]:
    """Do as `attach_lora` does but leave adapters without values, and give what fills them.

    Between the two the model may get its own values, or be shared with other processes.
    """
    refuse_second(model)
    saved = saved_parameters(model, config.modules_to_save)
    layers = targeted_layers(model, config)
    weights = starting_weights(model, layers, config)

    before = freeze(model)
    for name, layer in layers.items():
        rank, layer.scaling = config.size(name)
        layer.dropout, layer.lora_config = config.dropout, config
        device, dtype = layer.weight.device, ADAPTER_DTYPES[config.dtype]
        layer.lora_A, layer.lora_B = (
            nn.Linear(*sizes, bias=False, device="meta", dtype=dtype).to_empty(device=device)
            for sizes in ((layer.in_features, rank), (rank, layer.out_features))
        )
        if config.dora:  # float32 at any dtype of A and B: steps of training are far below a length's 16-bit digits
            layer.lora_magnitude_vector = nn.Parameter(torch.empty(layer.out_features, device=device))
    train_whole(model, saved, ADAPTER_DTYPES[config.dtype])
    return partial(start, model, layers, tuple(saved), weights, record(model, config, before))


@torch.no_grad()
def start(
    model: nn.Module,
    layers: dict[str, AdaptableLinear],
    saved: tuple[str, ...],
    weights: Callable[[str], Tensor] | None,
    attachment: Attachment,
) -> None:
    """Give the adapters of these layers their first values, and note those of what is trained whole."""
    config, shared = attachment.config, shares.any_shared(model)
    if weights is None:
        for layer in layers.values():
            start_anew(layer)
    else:
        by_turns(
            tuple(layers),
            lambda name: divided(layers[name], weights(name), config.init),
            lambda name, begun, source: take(layers[name], begun, source),
            together=shared,
        )
    for layer in layers.values():
        if layer.lora_magnitude_vector is not None:
            with shares.together(layer):
                lengths = layer.row_lengths()
            shares.put(layer.lora_magnitude_vector, lengths)
    for name in saved:
        attachment.originals[name] = shares.local(computed_parameter(model, name)).to("cpu", copy=True)


def start_anew(layer: AdaptableLinear) -> None:
    """The default start, drawn whole, so that it does not depend on how many processes share it."""
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    a, b = layer.lora_A.weight, layer.lora_B.weight
    # New layers come with random numbers of torch's. They are drawn, as they always were, and not used.
    drawn = [nn.Linear(w.shape[1], w.shape[0], bias=False, device=shares.home(w), dtype=w.dtype).weight for w in (a, b)]
    nn.init.kaiming_uniform_(drawn[0], a=math.sqrt(5))
    shares.put(a, drawn[0])
    shares.local(b).zero_()


def merged(base: Float[Tensor, "N K"], layer: AdaptableLinear) -> Float[Tensor, "N K"]:
    """The weight, in float32, that on its own does what `base` and the layer's adapter do together.

    `base` is what the adapter was made for: with init="pissa" or "loftq" not the checkpoint's weight but the layer's.
    """
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    weight = base.float() + layer.scaling * (layer.lora_B.weight.float() @ layer.lora_A.weight.float())
    if layer.lora_magnitude_vector is None:
        return weight
    lengths = torch.linalg.vector_norm(weight, dim=1)
    return weight * ratio(layer.lora_magnitude_vector.float(), lengths)[:, None]


def remove_lora(model: nn.Module, attachment: Attachment) -> None:
    """Take A and B off; a start that changed the base cannot be undone."""
    if attachment.config.init != "default":
        raise ValueError(
            f"adapters that start with init={attachment.config.init!r} have changed the base; load the model again"
        )
    for _, layer in list(adapted_layers(model)):
        layer.lora_A = layer.lora_B = layer.lora_config = layer.lora_magnitude_vector = None


def targeted_layers(model: nn.Module, config: LoraConfig) -> dict[str, AdaptableLinear]:
    """The layers that `config.target_modules` names; a name that fits none is an error.

    What is trained whole gets no adapter beside.
    """
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, AdaptableLinear) and not within(name, config.modules_to_save)
    }
    chosen = {name: layer for name, layer in layers.items() if config.targets(name, layer.in_head)}
    targets = config.target_modules
    wanted = (targets,) if isinstance(targets, str) else targets
    single = [LoraConfig(target_modules=targets if isinstance(targets, str) else (w,)) for w in wanted]
    unused = [w for w, one in zip(wanted, single, strict=True) if not any(map(one.targets, layers))]
    if unused:
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise ValueError(f"lora: no layer is called {', '.join(unused)}; this model has {leaves}")
    return chosen


def adapter_shapes(model: nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an adapter of this configuration has on this model."""
    saved = saved_parameters(model, config.modules_to_save)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in targeted_layers(model, config).items():
        rank, _ = config.size(name)
        shapes[f"{name}.lora_A.weight"] = (rank, layer.in_features)
        shapes[f"{name}.lora_B.weight"] = (layer.out_features, rank)
        if config.dora:
            shapes[f"{name}.lora_magnitude_vector"] = (layer.out_features,)
    return shapes | {name: tuple(p.shape) for name, p in saved.items()}
