"""What is put together at once where a model is shared: parameters of which a process has rows, whole for a while."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from train.planner.ledger import Ledger

GATHERED = "gathered"


class Shared:
    """A parameter, of which a process has some rows; the model's own is made whole and let go of."""

    def __init__(self, ledger: Ledger, whole: nn.Parameter, processes: int, dtype: torch.dtype | None) -> None:
        """`dtype` is what it is cast to where it is put together, if to another than its own."""
        self.ledger, self.whole = ledger, whole
        rows = -(-whole.shape[0] // processes)
        entry = ledger.live[whole.untyped_storage()._cdata]
        before, ledger.label = ledger.label, entry.label
        share = torch.empty((rows, *whole.shape[1:]), dtype=whole.dtype, device="meta")
        ledger.label = before
        self.share = nn.Parameter(share, requires_grad=whole.requires_grad)
        self.cast = dtype is not None and whole.is_floating_point() and dtype != whole.dtype
        if self.cast:
            whole.data = torch.empty(whole.shape, dtype=dtype, device="meta")
        self.nbytes = share.numel() * whole.element_size()
        """Of the share, as it is sent."""
        self.processes = processes
        self.summed: Tensor | None = None
        ledger.resize(whole, 0, GATHERED)

    def put_together(self) -> None:
        self.ledger.resize(self.whole, self.nbytes * self.processes, GATHERED)

    def let_go(self) -> None:
        self.ledger.resize(self.whole, 0, GATHERED)

    def keep_gradient(self, dtype: torch.dtype | None) -> None:
        """Sum what autograd has made in the dtype of sums."""
        if self.summed is not None or (self.whole.grad is not None and dtype not in (None, self.whole.grad.dtype)):
            made = self.gradient()
            assert made is not None
            self.summed = made.to(dtype)

    def gradient(self) -> Tensor | None:
        """The whole gradient, which is handed over."""
        made, self.whole.grad = self.whole.grad, None
        if self.summed is None:
            return made
        summed, self.summed = self.summed, None
        return summed.add_(made) if made is not None else summed


@dataclass(eq=False)
class Unit:
    """Parameters that are put together at once."""

    parameters: list[Shared]
    whole: bool = False
    buffer: Tensor | None = None
    """What is on its way."""
    when: str = "idle"
    order: list[int] = field(default_factory=list)
    """Its places among the units that have run forward."""


class Passed(torch.autograd.Function):
    """What goes into a unit, unchanged; when its gradient comes out, the unit's backward is done, and `done` called."""

    @staticmethod
    def forward(ctx: Any, done: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.done = done
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.done()
        return (None, *gradients)
