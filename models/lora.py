"""LoRA: a trained low-rank branch beside a frozen linear layer, y = x W^T + scaling (x A^T) B^T.

A (rank, in) starts Kaiming-uniform and B (out, rank) zero, so that training starts from the base model
exactly. Only A and B are trained. Hu et al. 2021; Dettmers et al. 2023 put one on every linear layer of the
blocks, which is the default here and what it takes to match full fine-tuning.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.linear import AdaptableLinear, Linear


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linear layers get an adapter, and how large it is."""

    rank: int = 64
    """Inner dimension r of A (r, in) and B (out, r)."""
    alpha: float = 16.0
    """The branch is scaled by alpha / rank (by alpha / sqrt(rank) with rslora)."""
    dropout: float = 0.1
    """Share of the branch's inputs set to zero in training; the base layer sees all of them."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Leaf names of the layers to adapt; "all-linear" is every linear layer but the head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps the branch's size steady as the rank grows."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of single layers, by leaf name or by the end of the dotted name."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas of single layers, likewise."""
    dtype: str = "float32"
    """What the adapters are stored and updated in; they multiply in the model's compute dtype."""

    def __post_init__(self) -> None:
        for where, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                raise ValueError(f"lora: {where} is {rank}; a rank is at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.dtype not in ADAPTER_DTYPES:
            raise ValueError(f"lora: dtype is {self.dtype!r}; choose from {', '.join(ADAPTER_DTYPES)}")
        if not self.target_modules:
            raise ValueError("lora: target_modules is empty; name layers, or give 'all-linear'")


ADAPTER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def attach_lora(model: nn.Module, config: LoraConfig = LoraConfig()) -> None:
    """Give the layers that `config` names an adapter each, and freeze everything else."""
    if next(adapted_layers(model), None) is not None:
        raise ValueError("the model already has adapters; merge_adapter removes them")
    layers = targeted_layers(model, config)
    model.requires_grad_(False)
    for name, layer in layers.items():
        rank = int(matching(config.rank_pattern, name, config.rank))
        alpha = matching(config.alpha_pattern, name, config.alpha)
        place = {"device": layer.weight.device, "dtype": ADAPTER_DTYPES[config.dtype]}
        layer.lora_A = nn.Linear(layer.in_features, rank, bias=False, **place)
        layer.lora_B = nn.Linear(rank, layer.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(layer.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(layer.lora_B.weight)
        layer.scaling = alpha / (math.sqrt(rank) if config.rslora else rank)
        layer.dropout, layer.lora_config = config.dropout, config


@torch.no_grad()
def merge_adapter(model: nn.Module) -> None:
    """Replace every adapted layer by a dense one: base + scaling B A in float32, then the model's dtype."""
    for name, layer in list(adapted_layers(model)):
        dense = merged(layer.dense_weight(), layer).to(layer.dtype)
        model.set_submodule(name, Linear.from_weight(dense, layer.bias))


def merged(base: Float[Tensor, "N K"], layer: AdaptableLinear) -> Float[Tensor, "N K"]:
    """The weight, in float32, that on its own does what `base` and the layer's adapter do together."""
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    return base.float() + layer.scaling * (layer.lora_B.weight.float() @ layer.lora_A.weight.float())


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptableLinear]]:
    """The layers that have an adapter, by name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptableLinear) and module.lora_A is not None:
            yield name, module


def targeted_layers(model: nn.Module, config: LoraConfig) -> dict[str, AdaptableLinear]:
    """The layers that `config.target_modules` names; a name that fits none is an error."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AdaptableLinear)}
    if config.target_modules == "all-linear":
        return layers
    wanted = (config.target_modules,) if isinstance(config.target_modules, str) else config.target_modules
    chosen = {name: m for name, m in layers.items() if any(fits(w, name) for w in wanted)}
    unused = [w for w in wanted if not any(fits(w, name) for name in layers)]
    if unused:
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise ValueError(f"lora: no layer is called {', '.join(unused)}; this model has {leaves}")
    return chosen


def matching(pattern: Mapping[str, float], name: str, default: float) -> float:
    """The value of the longest key that fits the layer's name."""
    keys = [key for key in pattern if fits(key, name)]
    return pattern[max(keys, key=len)] if keys else default


def fits(key: str, name: str) -> bool:
    """Is the key a layer's leaf name or the end of its dotted name? It may be a pattern, as PEFT allows."""
    return re.fullmatch(rf"(.*\.)?({key})", name) is not None
