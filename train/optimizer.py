"""The optimizer: AdamW on whatever is trainable, with the paper's settings (arXiv:2305.14314, appendix B).

With LoRA+ (Hayou et al. 2024) B learns at a higher rate than A: B starts at zero and takes its inputs from A, so that
at one rate for both it learns too slowly in a wide model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from models.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the adapters are moved: the optimizer, its learning rate over time, and clipping."""

    name: Literal["adamw"] = "adamw"
    """The update rule."""
    learning_rate: float = 2e-4
    """The rate after warm-up; the paper takes 2e-4 up to 13B and 1e-4 above."""
    lora_plus_ratio: float = 1.0
    """LoRA+: how many times that rate B learns at, and A and all else at the rate itself; its paper takes 16."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Share of a parameter taken away at each step, times the learning rate."""
    max_grad_norm: float = 0.3
    """Gradients are scaled down to this norm where it is larger; inf never clips."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the rate goes on after warm-up."""
    min_ratio: float = 0.0
    """What a cosine ends at, as a share of the learning rate."""
    warmup_ratio: float = 0.03
    """Share of all steps over which the rate rises linearly from 0."""
    warmup_steps: int | None = None
    """The same as a number of steps, over the ratio when given."""

    def __post_init__(self) -> None:
        if self.name != "adamw":
            raise ValueError(f"the optimizer must be adamw, not {self.name!r}")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be constant or cosine, not {self.schedule!r}")
        for field in ("learning_rate", "lora_plus_ratio", "eps"):
            value = getattr(self, field)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field} must be a positive number, not {value}")
        for field in ("beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 0 and below 1, not {getattr(self, field)}")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay must not be negative, not {self.weight_decay}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0 (inf never clips), not {self.max_grad_norm}")
        for field in ("min_ratio", "warmup_ratio"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is a share between 0 and 1, not {getattr(self, field)}")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, not {self.warmup_steps}")


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
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
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    set_learning_rate(optimizer, config.learning_rate)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of a step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
