"""IA3: learned vectors that scale what a layer gives or takes, y = l * (W x + b) or y = W (l * x) + b.

Liu et al. 2022 scale the keys, the values and what goes into a feed-forward layer's last product. A vector has one
number for each output (or input) and starts as ones, so that training starts from the base model exactly. Merged, it
scales the rows (or columns) of the weight. LLaMA's blocks have 2 * key/value width + F numbers each.

Letters: N outputs, K inputs, F feed-forward width.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.attachment import Attachment, freeze, record, refuse_second
from models.linear import AdaptableLinear
from models.lora_config import ADAPTER_DTYPES, check_dtype, ends_with, fits
from models.parallel import shares
from models.whole import computed_parameter, saved_parameters, train_whole, within

# The vectors of the paper by the names of each architecture: on outputs, and on inputs.
DEFAULT = {
    "llama": (("k_proj", "v_proj"), ("down_proj",)),
    "t5": (("k", "v"), ("wo",)),
    "roberta": (("key", "value"), (r"layer\.\d+\.output\.dense",)),
}


@dataclass(frozen=True, kw_only=True)
class Ia3Config:
    """Which linear layers are scaled, and on which side."""

    target_modules: str | tuple[str, ...] = "default"
    """Leaf names of the layers to scale, or ends of dotted names; "default" is keys, values and the last layer of each
    feed-forward part. A single other text may be a regular expression of such an end."""
    feedforward_modules: str | tuple[str, ...] = "default"
    """Which of them are scaled on their inputs, likewise; "default" is the last layers of the feed-forward parts."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole and saved with the vectors, such as a fresh classifier."""
    dtype: str = "float32"
    """What the vectors are stored and updated in."""

    def __post_init__(self) -> None:
        check_dtype("ia3", self.dtype)
        if not self.target_modules:
            raise ValueError("ia3: target_modules is empty; name layers, or give 'default'")
        for where in ("target_modules", "feedforward_modules"):
            given = getattr(self, where)
            for pattern in (given,) if isinstance(given, str) else given:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"ia3: {where}: {pattern!r} is not a regular expression ({error})") from error


def prepare_ia3(model: nn.Module, config: Ia3Config) -> Callable[[], None]:
    """Give the layers that `config` names a vector each without values, freeze all else; what fills them comes back."""
    refuse_second(model)
    saved = saved_parameters(model, config.modules_to_save)
    layers = scaled_layers(model, config)
    before, dtype = freeze(model), ADAPTER_DTYPES[config.dtype]
    for layer, on_input in layers.values():
        vector = torch.empty(vector_shape(layer, on_input), dtype=dtype, device=layer.weight.device)
        layer.ia3_l, layer.ia3_on_input = nn.Parameter(vector), on_input
    train_whole(model, saved, dtype)
    return partial(start, model, [layer for layer, _ in layers.values()], tuple(saved), record(model, config, before))


@torch.no_grad()
def start(model: nn.Module, layers: list[AdaptableLinear], saved: tuple[str, ...], attachment: Attachment) -> None:
    """Vectors of ones, and a note of what is trained whole."""
    for layer in layers:
        assert layer.ia3_l is not None
        shares.local(layer.ia3_l).fill_(1.0)
    for name in saved:
        attachment.originals[name] = shares.local(computed_parameter(model, name)).to("cpu", copy=True)


def vector_shape(layer: AdaptableLinear, on_input: bool) -> tuple[int, int]:
    """PEFT's: a row of inputs, or a column of outputs."""
    return (1, layer.in_features) if on_input else (layer.out_features, 1)


def scaled_layers(model: nn.Module, config: Ia3Config) -> dict[str, tuple[AdaptableLinear, bool]]:
    """The layers that `config` names, and whether each is scaled on its inputs; a name that fits none is an error."""
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, AdaptableLinear) and not within(name, config.modules_to_save)
    }
    outputs, inputs = defaults(model, config)
    inputs = inputs if config.feedforward_modules == "default" else config.feedforward_modules
    targets = (*outputs, *inputs) if config.target_modules == "default" else config.target_modules
    wanted = (targets,) if isinstance(targets, str) else targets
    unused = [target for target in wanted if not any(named(name, (target,)) for name in layers)]
    if unused:
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise ValueError(f"ia3: no layer is called {', '.join(unused)}; this model has {leaves}")
    return {name: (layer, named(name, inputs)) for name, layer in layers.items() if named(name, targets)}


def defaults(model: nn.Module, config: Ia3Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if "default" not in (config.target_modules, config.feedforward_modules):
        return (), ()
    described: Any = getattr(model, "config", None)
    kind = described.to_dict()["model_type"] if described is not None else type(model).__name__
    if kind not in DEFAULT:
        raise ValueError(f"ia3: which layers a {kind} scales is not known; name target_modules and feedforward_modules")
    return DEFAULT[kind]


def named(name: str, targets: str | tuple[str, ...]) -> bool:
    """Is the layer one of these: names, or ends of them, or patterns of such ends?"""
    if isinstance(targets, str):
        return fits(targets, name)
    return any(ends_with(name, target) or fits(target, name) for target in targets)


def ia3_shapes(model: nn.Module, config: Ia3Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that vectors of this configuration have on this model."""
    saved = saved_parameters(model, config.modules_to_save)
    layers = scaled_layers(model, config)
    shapes = {f"{name}.ia3_l": vector_shape(layer, on_input) for name, (layer, on_input) in layers.items()}
    return shapes | {name: tuple(p.shape) for name, p in saved.items()}


def scaled(base: Float[Tensor, "N K"], layer: AdaptableLinear) -> Float[Tensor, "N K"]:
    """The weight, in float32, that on its own does what `base` and the layer's vector do together."""
    assert layer.ia3_l is not None
    return base.float() * layer.ia3_l.detach().float()


def scaled_bias(bias: Float[Tensor, " N"], layer: AdaptableLinear) -> Float[Tensor, " N"]:
    """The bias that belongs to it: a vector on outputs scales it too."""
    assert layer.ia3_l is not None
    return bias if layer.ia3_on_input else (bias.float() * layer.ia3_l.detach().float().flatten()).to(bias.dtype)


def remove_ia3(model: nn.Module, attachment: Attachment) -> None:
    for layer in model.modules():
        if isinstance(layer, AdaptableLinear):
            layer.ia3_l = None
