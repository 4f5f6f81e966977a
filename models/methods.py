"""The methods that train little beside a frozen base: LoRA, IA3, BitFit and prefixes, attached and taken off one way.

Each is a configuration, and a file with what is particular to it. Here is what is said of all: to attach, to merge and
to detach.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models import bitfit, ia3, lora, prefix
from models.attachment import Attachment, adapted_layers, attached, note
from models.bitfit import BitfitConfig, refuse_homeless
from models.ia3 import Ia3Config
from models.linear import AdaptableLinear, Linear
from models.lora_config import LoraConfig
from models.parallel import shares
from models.prefix import PrefixConfig, refuse_merging
from models.whole import give_back, settle

MethodName = Literal["lora", "ia3", "bitfit", "prefix"]
AdapterConfig = LoraConfig | Ia3Config | BitfitConfig | PrefixConfig


@dataclass(frozen=True)
class Method:
    """What a method has of its own."""

    name: MethodName
    peft_type: str
    """What adapter files call it."""
    prepare: Callable[[nn.Module, Any], Callable[[], None]]
    """Attach without values; what fills them comes back."""
    shapes: Callable[[nn.Module, Any], dict[str, tuple[int, ...]]]
    """Name and shape of every tensor that it would train."""
    remove: Callable[[nn.Module, Attachment], None]
    """Take its own parameters off."""


METHODS: dict[type, Method] = {
    LoraConfig: Method("lora", "LORA", lora.prepare_lora, lora.adapter_shapes, lora.remove_lora),
    Ia3Config: Method("ia3", "IA3", ia3.prepare_ia3, ia3.ia3_shapes, ia3.remove_ia3),
    BitfitConfig: Method("bitfit", "BITFIT", bitfit.prepare_bitfit, bitfit.bitfit_shapes, bitfit.remove_bitfit),
    PrefixConfig: Method("prefix", "PREFIX_TUNING", prefix.prepare_prefix, prefix.prefix_shapes, prefix.remove_prefix),
}


def attach(model: nn.Module, config: AdapterConfig) -> None:
    """Let the model train what `config` says, and freeze everything else.

    What is wrong with the configuration is found before the model is changed.
    """
    prepare(model, config)()


def prepare(model: nn.Module, config: AdapterConfig) -> Callable[[], None]:
    """Do as `attach` does but leave what is new without values, and give what fills it.

    Between the two the model may get its own values, or be shared with other processes.
    """
    return METHODS[type(config)].prepare(model, config)


def adapter_shapes(model: nn.Module, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an adapter of this configuration has on this model."""
    return METHODS[type(config)].shapes(model, config)


def detach(model: nn.Module) -> None:
    """Take the adapters off again: the model is what it was before they were attached, gradients and all."""
    attachment = attached(model)
    if attachment is None:
        return
    shares.refuse_shared(model, "taking an adapter off")
    METHODS[type(attachment.config)].remove(model, attachment)
    give_back(model, attachment.originals)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in attachment.trainable_before)
    note(model, None)


@torch.no_grad()
def merge_adapter(model: nn.Module) -> None:
    """Replace every adapted layer by a dense one: what `merged` says in float32, then the model's dtype.

    What was trained whole, biases among it, is rounded to the model's dtype as well. A prefix is refused.
    """
    shares.refuse_shared(model, "merging an adapter")
    refuse_unmergeable(model)
    attachment = attached(model)
    for name, layer in list(adapted_layers(model)):
        dense = merged(layer.dense_weight(), layer).to(layer.dtype)
        bias = layer.bias
        if bias is not None and layer.ia3_l is not None:
            bias = nn.Parameter(merged_bias(bias.detach(), layer))
        model.set_submodule(name, Linear.from_weight(dense, bias, layer.in_head))
    if attachment is not None:
        settle(model, (*attachment.originals, *attachment.added))
        note(model, None)


def refuse_unmergeable(model: nn.Module) -> None:
    """Refuse what no checkpoint of the model can hold."""
    attachment = attached(model)
    if attachment is not None:
        refuse_merging(attachment)
        refuse_homeless(model, attachment)


def merged(base: Float[Tensor, "N K"], layer: AdaptableLinear) -> Float[Tensor, "N K"]:
    """The weight, in float32, that on its own does what `base` and the layer's adapter, if it has one, do together.

    `base` is what the adapter was made for: with init="pissa" or "loftq" not the checkpoint's weight but the layer's.
    """
    if layer.ia3_l is not None:
        return ia3.scaled(base, layer)
    return base.float() if layer.lora_A is None else lora.merged(base, layer)


def merged_bias(bias: Float[Tensor, " N"], layer: AdaptableLinear) -> Float[Tensor, " N"]:
    """The bias that belongs to it."""
    return bias if layer.ia3_l is None else ia3.scaled_bias(bias, layer)
