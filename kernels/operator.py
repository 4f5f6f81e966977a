"""An operator in two guises: one that torch knows, for graphs, and a plain autograd function, for calls one by one.

`torch.compile`, a planner's tensors without memory, or a mode that looks at every operator want it whole, with a schema
and shapes that follow without values: torch's custom operators. But to pass through one takes more Python than some
kernels take time, five launches' worth on a GPU. So what is merely to be computed goes around, through the same
functions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


class Operator:
    """`function` under a name and schema of torch's. It gets tensors first; its gradients are registered as torch's."""

    def __init__(self, name: str, schema: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.known = torch.library.custom_op(f"qlora::{name}", function, mutates_args=(), schema=schema)
        self.differentiable: Any = None
        self.register_fake = self.known.register_fake
        self.__name__, self.__doc__ = name, function.__doc__

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """What a backward pass gets of the context, and what it gives, as torch's custom operators have it."""
        self.known.register_autograd(backward, setup_context=setup_context)
        function = self.function

        def forward(ctx: Any, *inputs: Any) -> Any:  # with a setup_context torch would study its signature each time
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.differentiable = type(self.__name__, (torch.autograd.Function,), members)

    def __call__(self, first: Tensor, *others: Any) -> Any:
        if wanted_whole(first):
            return self.known(first, *others)
        if self.differentiable is None or not torch.is_grad_enabled():
            return self.function(first, *others)
        return self.differentiable.apply(first, *others)


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make an operator of a function."""
    return lambda function: Operator(name, schema, function)


def wanted_whole(tensor: Tensor) -> bool:
    """Does something look at operators rather than at their results?"""
    return (
        torch.compiler.is_compiling()
        or tensor.device.type == "meta"
        or type(tensor) not in PLAIN
        or torch._C._len_torch_dispatch_stack() > 0
    )
