"""Gradient checkpointing: a block keeps only what came in, and backward computes the rest again.

But for the last product of the block, a quarter of its work in LLaMA: nothing in backward asks for its result, only
for what it was made from. While a block is computed again, `last_product` says so to the operators, which then
return memory that nobody reads. (Should the layer scale its product by something learned, backward does read it:
`kept_product` is for such a layer, wherever it stands.)
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from kernels.ops import values_needed


class State(threading.local):  # backward on a GPU runs in a thread of its own
    again = False


state = State()


def recomputed(block: Callable[..., Any], *arguments: Any) -> Any:
    """What the block gives, with as little kept for backward as can be."""
    if torch.compiler.is_compiling():  # the graph decides itself what to compute again
        return checkpoint(block, *arguments, use_reentrant=False)
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))


@contextmanager
def again() -> Iterator[None]:
    """The time in which a block is computed for the second time."""
    before, state.again = state.again, True
    try:
        yield
    finally:
        state.again = before


def last_product() -> AbstractContextManager[None]:
    """Around the product that a block ends with: in the second round its values are not needed."""
    return values_needed(False) if state.again else nullcontext()


def kept_product() -> AbstractContextManager[None]:
    """Around a product that backward itself reads: its values are needed in the second round as well."""
    return values_needed(True) if state.again else nullcontext()
