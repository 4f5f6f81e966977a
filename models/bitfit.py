"""BitFit: only the biases of the blocks are trained (Ben Zaken et al. 2022), those of linear layers and of norms.

RoBERTa has them. LLaMA and T5 have none in their linear layers, so each gets one of zeros, with which the model is the
base still. A LLaMA with such biases is a released layout (`attention_bias` and `mlp_bias` in its config.json), so it
can be merged into a checkpoint. T5's layout has no place for them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from models.attachment import Attachment, freeze, record, refuse_second
from models.errors import ConfigError
from models.linear import AdaptableLinear
from models.llama import Llama
from models.lora_config import ADAPTER_DTYPES, check_dtype
from models.model import Stack
from models.parallel import shares
from models.whole import computed_parameter, saved_parameters, settle, train_whole, trained_parameter


@dataclass(frozen=True, kw_only=True)
class BitfitConfig:
    """Biases are all that is trained, and what is named here."""

    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole and saved with the biases, such as a fresh classifier."""
    dtype: str = "float32"
    """What they are stored and updated in; they are added in the model's compute dtype."""

    def __post_init__(self) -> None:
        check_dtype("bitfit", self.dtype)


def prepare_bitfit(model: nn.Module, config: BitfitConfig) -> Callable[[], None]:
    """Make the biases trainable, new ones without values, and freeze all else; what fills them comes back."""
    refuse_second(model)
    saved = saved_parameters(model, config.modules_to_save)
    places = biases(model)
    before = freeze(model)
    added = tuple(name for name in places if model.get_submodule(name.rpartition(".")[0]).bias is None)
    for name in added:
        layer = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, AdaptableLinear)
        layer.bias = nn.Parameter(torch.empty(layer.out_features, dtype=layer.dtype, device=layer.weight.device))
    model_config = getattr(model, "config", None)
    if added and isinstance(model, Llama):
        model.config = model.model.config = replace(model.config, attention_bias=True, mlp_bias=True)
    learning = {name: model.get_parameter(name) for name in places} | saved
    train_whole(model, learning, ADAPTER_DTYPES[config.dtype])
    attachment = record(model, config, before, added=added, model_config=model_config)
    return partial(start, model, tuple(learning), attachment)


@torch.no_grad()
def start(model: nn.Module, learning: tuple[str, ...], attachment: Attachment) -> None:
    """Zeros for the new biases, and a note of all the others."""
    for name in learning:
        if name in attachment.added:
            shares.local(trained_parameter(model, name)).zero_()
        else:
            attachment.originals[name] = shares.local(computed_parameter(model, name)).to("cpu", copy=True)


def biases(model: nn.Module) -> dict[str, int]:
    """Every bias in the blocks by name, whether it is there yet or not, with its length."""
    found: dict[str, int] = {}
    for prefix, stack in model.named_modules():
        if not isinstance(stack, Stack):
            continue
        for name, module in stack.named_modules(prefix=prefix):
            if isinstance(module, AdaptableLinear):
                found[f"{name}.bias"] = module.out_features
            elif isinstance(module, nn.LayerNorm) and module.bias is not None:
                found[f"{name}.bias"] = module.bias.shape[0]
    if not found:
        raise ValueError(f"bitfit: {type(model).__name__} has no blocks with linear layers, so no bias to train")
    return found


def bitfit_shapes(model: nn.Module, config: BitfitConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that is trained."""
    saved = saved_parameters(model, config.modules_to_save)
    return {name: (length,) for name, length in biases(model).items()} | {n: tuple(p.shape) for n, p in saved.items()}


def remove_bitfit(model: nn.Module, attachment: Attachment) -> None:
    """Take off the biases that the model did not have."""
    settle(model, attachment.added)
    for name in attachment.added:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_parameter(leaf, None)
    if attachment.added and isinstance(model, Llama):
        model.config = model.model.config = attachment.model_config


def refuse_homeless(model: nn.Module, attachment: Attachment) -> None:
    """Refuse to make a checkpoint of biases that its layout has no place for."""
    if attachment.added and not isinstance(model, Llama):
        raise ConfigError(
            f"a checkpoint of a {type(model).__name__} has no place for the {len(attachment.added)} biases that were "
            "added to its linear layers; keep base and adapter apart"
        )
