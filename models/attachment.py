"""What is trained beside a frozen base, said in one record, whichever method put it there.

LoRA and IA3 put parameters of their own into linear layers, BitFit trains biases, a prefix is one parameter for all
layers. To save, restore, count or take off what was attached it is enough to know the method's settings and the names
of what it trains.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.linear import AdaptableLinear
from models.whole import trained_parameters


@dataclass(frozen=True)
class Attachment:
    """What has to be known of a model with adapters, to save them and to take them off."""

    config: Any
    """The method's settings: a LoraConfig, Ia3Config, BitfitConfig or PrefixConfig."""
    names: tuple[str, ...]
    """What is trained, by plain name."""
    trainable_before: frozenset[str]
    """Parameters that required a gradient."""
    originals: dict[str, Tensor]
    """What the model's own parameters that are trained held before, on the CPU."""
    added: tuple[str, ...] = ()
    """Which of what is trained are parameters that such a model has, but this one's checkpoint has not."""
    model_config: Any = None
    """The model's config before, where they changed it."""


def refuse_second(model: nn.Module) -> None:
    """A model has adapters of one attachment at a time."""
    if attached(model) is not None or next(adapted_layers(model), None) is not None:
        raise ValueError("the model already has adapters; merge_adapter removes them")


def freeze(model: nn.Module) -> frozenset[str]:
    """Train nothing from now on; the names of what was trained before come back."""
    before = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    model.requires_grad_(False)
    return before


def record(model: nn.Module, config: Any, trainable_before: frozenset[str], **more: Any) -> Attachment:
    """Note what is trained now, all of which was attached."""
    attachment = Attachment(config, tuple(trained_parameters(model)), trainable_before, {}, **more)
    note(model, attachment)
    return attachment


def attached(model: nn.Module) -> Attachment | None:
    return getattr(model, "attachment", None)


def note(model: nn.Module, attachment: Attachment | None) -> None:
    model.__dict__["attachment"] = attachment


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptableLinear]]:
    """The linear layers that have parameters of an adapter, by name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptableLinear) and module.adapted:
            yield name, module
