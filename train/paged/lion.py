"""Lion: one state for each parameter instead of two, and steps of one length in every direction."""

from collections.abc import Mapping
from typing import Any

import torch

from kernels.updates import LionNumbers
from train.paged.adamw import check_hyperparameters
from train.paged.fused import FusedOptimizer, Paging
from train.paged.store import Slot


class Lion(FusedOptimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675). Its authors take a third to a tenth of AdamW's learning rate."""

    slots = (Slot("exp_avg", torch.float32),)
    operator = "lion"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        paging: Paging | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, paging)

    def check_group(self, group: Mapping[str, Any]) -> None:
        check_hyperparameters(group)

    def numbers(self, group: Mapping[str, Any], step: int) -> LionNumbers:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        return LionNumbers(beta1, beta2, lr, 1 - lr * group["weight_decay"])
