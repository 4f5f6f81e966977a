"""Which optimizer moves whatever is trainable, with the paper's settings (arXiv:2305.14314, appendix B).

With LoRA+ (Hayou et al. 2024) B learns at a higher rate than A: B starts at zero and takes its inputs from A, so that
at one rate for both it learns too slowly in a wide model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from models.errors import ConfigError
from train.paged import AdamW, AdamW8bit, Lion, PagedAdamW, PagedAdamW8bit
from train.paged.fused import FusedOptimizer

Name = Literal["adamw", "paged-adamw", "adamw-8bit", "paged-adamw-8bit", "lion"]
NAMES: tuple[str, ...] = get_args(Name)
ADAMW = {"adamw": AdamW, "adamw-8bit": AdamW8bit}
PAGED = {"paged-adamw": PagedAdamW, "paged-adamw-8bit": PagedAdamW8bit}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the adapters are moved: the optimizer, its learning rate over time, and clipping."""

    name: Name = "adamw"
    """The update rule, its states in 32 or 8 bits; paged ones are in managed memory, from which spikes evict them."""
    allow_oversubscription: bool = False
    """Paged: allocate states even if the device could not hold all managed memory at once."""
    learning_rate: float = 2e-4
    """The rate after warm-up; the paper takes 2e-4 up to 13B and 1e-4 above."""
    lora_plus_ratio: float = 1.0
    """LoRA+: how many times that rate B learns at, and A and all else at the rate itself; its paper takes 16."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float | None = None
    """Decay of the mean of squared gradients, by default 0.999; for lion of its one mean, 0.99."""
    eps: float = 1e-8
    """Added to the root of the second moment; lion has none."""
    weight_decay: float = 0.0
    """Share of a parameter taken away at each step, times the learning rate."""
    max_grad_norm: float = 0.3
    """Gradients are scaled down to this norm where it is larger; inf never clips."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the rate goes on after warm-up."""
    min_ratio: float = 0.0
    """What a cosine or a linear decay ends at, as a share of the learning rate."""
    warmup_ratio: float = 0.03
    """Share of all steps over which the rate rises linearly from 0."""
    warmup_steps: int | None = None
    """The same as a number of steps, over the ratio when given."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"the optimizer must be one of {', '.join(NAMES)}, not {self.name!r}")
        if self.allow_oversubscription and not self.name.startswith("paged-"):
            raise ValueError(f"allow_oversubscription is for paged optimizers, and {self.name} is none")
        if self.schedule not in ("constant", "cosine", "linear"):
            raise ValueError(f"schedule must be constant, cosine or linear, not {self.schedule!r}")
        for field in ("learning_rate", "lora_plus_ratio", "eps"):
            value = getattr(self, field)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field} must be a positive number, not {value}")
        for field, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{field} must be at least 0 and below 1, not {value}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay must not be negative, not {self.weight_decay}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0 (inf never clips), not {self.max_grad_norm}")
        for field in ("min_ratio", "warmup_ratio"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is a share between 0 and 1, not {getattr(self, field)}")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, not {self.warmup_steps}")


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> FusedOptimizer:
    """Give the optimizer that the config names, over these parameters, which are known by their names.

    Each of its groups has a `ratio`, by which the learning rate of a step is multiplied for it.
    """
    b = [parameter for name, parameter in parameters.items() if ".lora_B." in name]
    others = [parameter for name, parameter in parameters.items() if ".lora_B." not in name]
    ratio = config.lora_plus_ratio
    if ratio == 1:
        groups = [{"params": list(parameters.values()), "ratio": 1.0}]
    elif not b:
        raise ConfigError(f"optimizer.lora_plus_ratio is {ratio}, but no lora_B is trained; leave it at 1")
    else:
        groups = [{"params": others, "ratio": 1.0}, {"params": b, "ratio": ratio}]
    optimizer = constructed(groups, config)
    set_learning_rate(optimizer, config.learning_rate)
    return optimizer


def constructed(groups: list[dict[str, Any]], config: OptimizerConfig) -> FusedOptimizer:
    """The class that is meant, with the settings that it has."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.name == "lion":
        return Lion(groups, rate, (config.beta1, 0.99 if config.beta2 is None else config.beta2), decay)
    betas = (config.beta1, 0.999 if config.beta2 is None else config.beta2)
    if config.name in PAGED:
        return PAGED[config.name](
            groups, rate, betas, config.eps, decay, allow_oversubscription=config.allow_oversubscription
        )
    return ADAMW[config.name](groups, rate, betas, config.eps, decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of a step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
