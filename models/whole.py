"""Modules that are trained whole beside the adapters: a fresh classifier, a head, an embedding with new tokens.

They are trained in the adapters' dtype or their own, whichever is wider: steps of training are smaller than the last
digit of a 16-bit weight and would be lost. The model goes on computing in its own dtype; where that is another,
reading the weight gives it rounded, and the wide one behind it is what learns. Such a parameter has another name in
`named_parameters()` (torch's parametrization gives it), but everything here and in the file uses the plain one.
"""

from collections.abc import Collection, Mapping

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


def train_whole(model: nn.Module, saved: Mapping[str, nn.Parameter], dtype: torch.dtype) -> dict[str, Tensor]:
    """Make these parameters trainable, in `dtype` or wider; returns what they hold, on the CPU."""
    for name, parameter in saved.items():
        owner, leaf = place(model, name)
        parameter.requires_grad_(True)
        wide = torch.promote_types(parameter.dtype, dtype)
        if wide != parameter.dtype:
            setattr(owner, leaf, nn.Parameter(parameter.detach().to(wide)))
            parametrize.register_parametrization(owner, leaf, Rounded(parameter.dtype), unsafe=True)
    return {name: p.detach().to("cpu", copy=True) for name, p in saved.items()}


class Rounded(nn.Module):
    """What the model computes with, of what is trained."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, wide: Tensor) -> Tensor:
        return wide.to(self.dtype)


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
