"""AdamW with states of 32 or 8 bits, in ordinary or in managed memory: four classes, one update."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from kernels.updates import STATE_BLOCK, AdamWNumbers
from nf4 import dequantize_dynamic, quantize_dynamic
from train.paged.fused import FusedOptimizer
from train.paged.memory import Paging
from train.paged.store import Slot

SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # which dynamic map holds a state in 8 bits
SLOTS = (Slot("exp_avg", torch.float32), Slot("exp_avg_sq", torch.float32))
SLOTS_8BIT = (
    Slot("exp_avg", torch.uint8),
    Slot("exp_avg_absmax", torch.float32, STATE_BLOCK),
    Slot("exp_avg_sq", torch.uint8),
    Slot("exp_avg_sq_absmax", torch.float32, STATE_BLOCK),
)


class AdamW(FusedOptimizer):
    """AdamW (Loshchilov and Hutter 2019) as in torch.optim.AdamW; states are float32 whatever parameters are."""

    slots = SLOTS
    operator = "adamw"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        paging: Paging | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, paging)

    def check_group(self, group: Mapping[str, Any]) -> None:
        check_hyperparameters(group)
        if not (group["eps"] >= 0 and math.isfinite(group["eps"])):
            raise ValueError(f"eps must be finite and not negative, not {group['eps']}")
        for option in ("amsgrad", "maximize"):
            if group.get(option):
                raise ValueError(f"{option} is not supported, and a parameter group has it set")

    def numbers(self, group: Mapping[str, Any], step: int) -> AdamWNumbers:
        return AdamWNumbers.of(step, float(group["lr"]), group["betas"], group["eps"], group["weight_decay"])

    def forms(self) -> tuple[tuple[Slot, ...], ...]:
        return (SLOTS, SLOTS_8BIT)

    def converted(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state in this class's precision, from 32 bits (torch.optim.AdamW's too) or from 8."""
        is_8bit = "exp_avg_absmax" in state
        if is_8bit == (self.slots is SLOTS_8BIT):
            return state
        return decoded(state) if is_8bit else encoded(state)

    def torch_state_dict(self) -> dict[str, Any]:
        """The state dict as torch.optim.AdamW would have it: float32 states, decoded if they are kept in 8 bits."""
        packed = self.state_dict()
        if self.slots is SLOTS:
            return packed
        return {**packed, "state": {k: decoded(state) for k, state in packed["state"].items()}}


class AdamW8bit(AdamW):
    """AdamW with states of 8 bits: 2.03 instead of 8 bytes for a parameter (arXiv:2110.02861)."""

    slots = SLOTS_8BIT
    operator = "adamw_8bit"


class PagedAdamW(AdamW):
    """AdamW with float32 states in managed memory, the optimizer of the QLoRA paper."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        allow_oversubscription: bool = False,
        paging: Paging | None = None,
    ) -> None:
        """`paging` has other settings; oversubscription is allowed if either says so."""
        paging = paging or Paging()
        paging = replace(paging, allow_oversubscription=allow_oversubscription or paging.allow_oversubscription)
        super().__init__(params, lr, betas, eps, weight_decay, paging=paging)


class PagedAdamW8bit(PagedAdamW):
    """AdamW with states of 8 bits in managed memory."""

    slots = SLOTS_8BIT
    operator = AdamW8bit.operator


def check_hyperparameters(group: Mapping[str, Any]) -> None:
    """Refuse rates and decays that no optimizer takes."""
    for name in ("lr", "weight_decay"):
        if not (group[name] >= 0 and math.isfinite(group[name])):
            raise ValueError(f"{name} must be finite and not negative, not {group[name]}")
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers, at least 0 and below 1, not {betas}")


def encoded(state: Mapping[str, Any]) -> dict[str, Any]:
    """float32 states in 8 bits."""
    result = dict(state)
    for name, signed in SIGNED.items():
        values = state[name].float()
        codes, absmax = quantize_dynamic(values.reshape(-1), STATE_BLOCK, signed)
        result |= {name: codes.view(values.shape), f"{name}_absmax": absmax}
    return result


def decoded(state: Mapping[str, Any]) -> dict[str, Any]:
    """States of 8 bits in float32."""
    result = {name: value for name, value in state.items() if not name.endswith("_absmax")}
    for name, signed in SIGNED.items():
        codes = state[name]
        values = dequantize_dynamic(codes.reshape(-1), state[f"{name}_absmax"], STATE_BLOCK, signed)
        result[name] = values.view(codes.shape)
    return result
