"""The stretches of a step, told by the block that is at work and what it does there."""

from typing import Any

import torch
from torch import nn

from kernels.planned import in_backward
from models.model import Stack
from train.planner.ledger import Ledger, Segment


def follow(ledger: Ledger, model: nn.Module) -> None:
    """Have the ledger know which block is at work, forward or backward."""
    for s, stack in enumerate(m for m in model.modules() if isinstance(m, Stack)):
        for i, block in enumerate(stack.blocks):
            block.register_forward_pre_hook(entering(ledger, s, i))
            block.register_forward_hook(leaving(ledger, s, i))


def entering(ledger: Ledger, s: int, i: int) -> Any:
    def hook(*_: Any) -> None:
        if not in_backward():
            ledger.enter(("forward", s, i))

    return hook


def leaving(ledger: Ledger, s: int, i: int) -> Any:
    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if not in_backward():
            ledger.enter(("after", s, i))
            output.register_hook(lambda gradient: ledger.enter(("backward", s, i)))

    return hook


def place_of(segment: Segment, count: int) -> Segment:
    """A segment with its block told by its place among `count`: first, second, last, or one of those between."""
    if len(segment) < 3:
        return segment
    kind, stack, i = segment
    place = "last" if i == count - 1 else ("first", "second")[i] if i < 2 else "middle"
    return (kind, stack, place)


def described(segment: Segment) -> str:
    """A segment in words."""
    if segment == ("update",):
        return "in the update"
    if len(segment) < 3:
        return "before the first block"
    kind, _, place = segment
    if kind == "after":
        return "at the loss" if place == "last" else f"after the {place} block"
    return f"in the {place} block, {kind}"
