"""Weights that are trained whole: a fresh classifier or an embedding beside the adapters, or all of a model.

They are trained in float32 (beside adapters, in those' dtype) or their own dtype, whichever is wider: steps of training
are smaller than the last digit of a 16-bit weight and would be lost. The model goes on computing in its own dtype;
where that is another, reading the weight gives it rounded, and the wide one behind it is what learns. Such a parameter
has another name in `named_parameters()` (torch's parametrization gives it), but everything here and in the file uses
the plain one.
"""

import re
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.linear import NF4Linear
from models.lora_config import ends_with


def saved_parameters(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """The parameters of the modules that `names` stands for; a name that fits none is an error."""
    modules = dict(model.named_modules())
    unused = [n for n in names if not any(ends_with(m, n) and list(modules[m].parameters()) for m in modules)]
    if unused:
        owners = {m.rpartition(".")[2] for m in modules if not m.endswith(("lora_A", "lora_B"))}
        leaves = sorted(leaf for leaf in owners if leaf and not leaf.isdigit())
        tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
        hint = "; its head is its embedding, and is trained with that" if tied else ""
        raise ValueError(
            f"lora: modules_to_save: no module with weights is called {', '.join(unused)}; "
            f"this model has {', '.join(leaves)}{hint}"
        )
    quantized = [name for name, m in modules.items() if isinstance(m, NF4Linear) and within(name, names)]
    if quantized:
        raise ValueError(
            f"lora: modules_to_save: {quantized[0]} is quantized and cannot be trained whole; give it an adapter, "
            "or load the model without quantization"
        )
    return {name: p for name, p in model.named_parameters() if within(name.rpartition(".")[0], names)}


def within(module: str, names: Collection[str]) -> bool:
    """Is it one of the modules that `names` stands for, or inside one?"""
    parts = module.split(".")
    owners = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(ends_with(owner, name) for owner in owners for name in names)


def train_every_weight(model: nn.Module) -> None:
    """Full fine-tuning: every parameter learns, in float32. One that is used twice is one parameter still."""
    quantized = [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]
    if quantized:
        raise ValueError(
            f"{len(quantized)} layers are quantized (first: {quantized[0]}), and codes cannot be trained; "
            "load the model without quantization, or train adapters"
        )
    train_whole(model, dict(model.named_parameters()), torch.float32)


def train_whole(model: nn.Module, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
    """Make these parameters trainable, in `dtype` or wider."""
    for name, parameter in parameters.items():
        owner, leaf = place(model, name)
        parameter.requires_grad_(True)
        wide = torch.promote_types(parameter.dtype, dtype)
        if wide != parameter.dtype:
            setattr(owner, leaf, nn.Parameter(parameter.detach().to(wide)))
            parametrize.register_parametrization(owner, leaf, Rounded(parameter.dtype), unsafe=True)


class Rounded(nn.Module):
    """What the model computes with, of what is trained."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, wide: Tensor) -> Tensor:
        return wide.to(self.dtype)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Everything that learns, adapters too, by plain name."""
    return {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def computed_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with its plain name, as the model computes with it: rounded one at a time."""
    for name, _ in model.named_parameters():
        yield plain_name(name), computed_parameter(model, plain_name(name))


def computed_parameter(model: nn.Module, name: str) -> Tensor:
    """The parameter behind a name, as the model computes with it."""
    owner, leaf = place(model, name)
    return getattr(owner, leaf).detach()


def computed_dtype(owner: nn.Module, leaf: str) -> torch.dtype:
    """The dtype that a parameter has where the model reads it, without rounding it to see."""
    if parametrize.is_parametrized(owner, leaf):
        rounded = owner.get_submodule(f"parametrizations.{leaf}.0")
        assert isinstance(rounded, Rounded)
        return rounded.dtype
    return owner.get_parameter(leaf).dtype


def plain_name(name: str) -> str:
    """A parameter's name in files, also while torch keeps another behind it that is trained in a wider dtype."""
    return re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)


def trained_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter behind a name, as it is trained."""
    owner, leaf = place(model, name)
    if parametrize.is_parametrized(owner, leaf):
        parameter = owner.get_parameter(f"parametrizations.{leaf}.original")
    else:
        parameter = owner.get_parameter(leaf)
    return parameter


def settle(model: nn.Module, names: Collection[str]) -> None:
    """What was trained becomes a plain parameter in the dtype that the model computes in."""
    for name in names:
        owner, leaf = place(model, name)
        put(model, name, getattr(owner, leaf).detach())


def give_back(model: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """The parameters are again what they were before they were trained."""
    for name, original in originals.items():
        put(model, name, original.to(trained_parameter(model, name).device))


def put(model: nn.Module, name: str, value: Tensor) -> None:
    owner, leaf = place(model, name)
    if parametrize.is_parametrized(owner, leaf):
        parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
    setattr(owner, leaf, nn.Parameter(value))


def place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner), leaf
