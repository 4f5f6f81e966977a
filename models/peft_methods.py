"""adapter_config.json of every method: LoRA's is in `models/peft_config.py`, those of IA3, BitFit and prefixes here.

IA3 and PREFIX_TUNING are PEFT's, which reads and writes the same files. BitFit it does not have: that file is for this
project alone, and says BITFIT. Of a layer that IA3 scales on its inputs PEFT asks whether its name ends in one of some
letters, so a leaf name is written only where that fits no other scaled layer.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from models.attachment import Attachment, adapted_layers, attached
from models.bitfit import BitfitConfig
from models.errors import CheckpointError
from models.ia3 import Ia3Config
from models.linear import AdaptableLinear
from models.llama import Llama
from models.lora_config import LoraConfig
from models.methods import METHODS, AdapterConfig
from models.peft_config import (
    check_names,
    chooses,
    common,
    lora_config,
    read_lora_config,
    refuse_unknown,
    saved_modules,
    saved_names,
    target_names,
)
from models.prefix import PrefixConfig
from models.readers import read_json
from models.tied_head import tied_heads

IA3_UNKNOWN = {"fan_in_fan_out": (False, None)}
PREFIX_UNKNOWN = {
    "prefix_projection": (False, None),  # an MLP that makes the prefix; PEFT saves what it makes without saying so
    "num_transformer_submodules": (1, None),
}


def peft_config(model: nn.Module) -> dict[str, Any]:
    """adapter_config.json, as PEFT writes it for the adapters of this model."""
    attachment = attached(model)
    assert attachment is not None
    writers = {LoraConfig: lora_config, Ia3Config: ia3_config, BitfitConfig: bitfit_config, PrefixConfig: prefix_config}
    return writers[type(attachment.config)](model, attachment)


def read_peft_config(path: Path, model: nn.Module, names: Collection[str]) -> AdapterConfig:
    """The configuration in an adapter_config.json, for this model; `names` are those of the tensors in the file."""
    raw = read_json(path)
    readers = {"LORA": read_lora_config, "IA3": read_ia3, "BITFIT": read_bitfit, "PREFIX_TUNING": read_prefix}
    assert set(readers) == {method.peft_type for method in METHODS.values()}
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or kind not in readers:
        raise CheckpointError(f"{path}: peft_type is {kind!r:.80}; what can be read is {', '.join(readers)}")
    return readers[kind](path, raw, model, names)


def ia3_config(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    config = attachment.config
    return {
        **common(model, "IA3", config.modules_to_save),
        "target_modules": target_names(model),
        "feedforward_modules": input_names(model),
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "modules_to_save": saved_names(model, config.modules_to_save) or None,
        "ensure_weight_tying": bool(tied_heads(model, attachment.originals)),
    }


def input_names(model: nn.Module) -> list[str]:
    """Ends of the names of the layers that are scaled on their inputs, which no other scaled layer's name has."""
    layers = dict(adapted_layers(model))
    others = [name for name, layer in layers.items() if not layer.ia3_on_input]
    leaves = {name: name.rpartition(".")[2] for name, layer in layers.items() if layer.ia3_on_input}
    return sorted({name if any(o.endswith(leaf) for o in others) else leaf for name, leaf in leaves.items()})


def read_ia3(path: Path, raw: dict[str, Any], model: nn.Module, names: Collection[str]) -> Ia3Config:
    refuse_unknown(path, raw, IA3_UNKNOWN)
    check_names(path, raw)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AdaptableLinear)}
    chosen = tuple(name for name, layer in layers.items() if chooses(raw, name, layer.in_head))
    if not chosen:
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise CheckpointError(f"{path}: target_modules names no layer of this model, which has {leaves}")
    inputs = raw.get("feedforward_modules") or ()
    return Ia3Config(
        target_modules=chosen,
        feedforward_modules=tuple(name for name in chosen if on_input(name, inputs)),
        modules_to_save=saved_modules(model, raw.get("modules_to_save") or [], names),
    )


def on_input(name: str, inputs: str | Collection[str]) -> bool:
    """Would PEFT scale the inputs of the layer of that name?"""
    return re.fullmatch(inputs, name) is not None if isinstance(inputs, str) else any(map(name.endswith, inputs))


def bitfit_config(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    saved = saved_names(model, attachment.config.modules_to_save)
    return {**common(model, "BITFIT", attachment.config.modules_to_save), "modules_to_save": saved or None}


def read_bitfit(path: Path, raw: dict[str, Any], model: nn.Module, names: Collection[str]) -> BitfitConfig:
    check_names(path, raw)
    return BitfitConfig(modules_to_save=saved_modules(model, raw.get("modules_to_save") or [], names))


def prefix_config(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    assert isinstance(model, Llama)
    c = model.config
    return {
        **common(model, "PREFIX_TUNING", ()),
        "num_virtual_tokens": attachment.config.num_virtual_tokens,
        "token_dim": c.num_key_value_heads * c.head_dim,
        "num_transformer_submodules": 1,
        "num_attention_heads": c.num_key_value_heads,  # so PEFT has it where queries share keys
        "num_layers": c.num_hidden_layers,
        "encoder_hidden_size": c.num_key_value_heads * c.head_dim,
        "prefix_projection": False,
    }


def read_prefix(path: Path, raw: dict[str, Any], model: nn.Module, names: Collection[str]) -> PrefixConfig:
    refuse_unknown(path, raw, PREFIX_UNKNOWN)
    tokens = raw.get("num_virtual_tokens")
    if type(tokens) is not int or tokens < 1:
        raise CheckpointError(f"{path}: num_virtual_tokens is {tokens!r:.80}; a whole number of at least 1 is needed")
    return PrefixConfig(num_virtual_tokens=tokens, init="normal")  # which the file's numbers replace
