"""The optimizer: AdamW on whatever is trainable, with the paper's settings (arXiv:2305.14314, appendix B)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the adapters are moved: the optimizer, its learning rate over time, and clipping."""

    name: Literal["adamw"] = "adamw"
    """The update rule."""
    learning_rate: float = 2e-4
    """The rate after warm-up; the paper takes 2e-4 up to 13B and 1e-4 above."""
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
        for field in ("learning_rate", "eps"):
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


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Give the optimizer that the config names, over these parameters."""
    return torch.optim.AdamW(
        list(parameters),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
