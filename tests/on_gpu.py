"""Where there is a GPU, tests of kernels run on it: on CPU tensors, which are carried there and back.

Without one Triton's interpreter takes CPU tensors (tests/interpreter.py), so tests are written once, for those. Here a
launch copies the whole memory of each to the GPU, and back when the kernel is done; what a kernel writes beside its
tensors comes back too, and is noticed. A kernel that is given addresses in a table finds none of these tensors, so
lists of them are carried before the table is made.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITCallable, JITFunction

EMPTY = torch.empty  # tests replace it by one that poisons memory


def mend() -> None:
    """Have kernels take CPU tensors, and be compiled from their own function, not from the check around it."""
    initialize, run = JITCallable.__init__, JITFunction.run

    def initialize_unwrapped(self: Any, fn: Any) -> None:
        initialize(self, inspect.unwrap(fn))

    def run_there(self: Any, *arguments: Any, **options: Any) -> Any:
        carried = Carried()
        there = [carried.there(a) for a in arguments], {name: carried.there(a) for name, a in options.items()}
        result = run(self, *there[0], **there[1])
        carried.back()
        return result

    JITCallable.__init__ = initialize_unwrapped
    JITFunction.run = run_there


def over_lists(form: Callable[..., None]) -> Callable[..., None]:
    """An update of lists of tensors that takes CPU tensors; the update as it is where there is no GPU."""
    if not torch.cuda.is_available():
        return form

    @wraps(form)
    def run_there(*lists: Any) -> None:
        carried = Carried()
        form(*([carried.there(each) for each in given] for given in lists))
        carried.back()
        params, *_ = lists
        torch.autograd.graph.increment_version([p for p in params if not p.is_inference()])

    return run_there


class Carried:
    """The memories of CPU tensors on the GPU: each once, so that tensors which share one still do."""

    def __init__(self) -> None:
        self.memories: dict[int, tuple[Tensor, Tensor]] = {}

    def there(self, argument: Any) -> Any:
        if not isinstance(argument, Tensor) or argument.device.type != "cpu":
            return argument
        memory = argument.untyped_storage()
        if memory.data_ptr() not in self.memories:
            with torch.inference_mode(False):
                here = EMPTY(0, dtype=torch.uint8).set_(memory)
                self.memories[memory.data_ptr()] = here, here.cuda()
        there = self.memories[memory.data_ptr()][1].untyped_storage()
        view = EMPTY(0, dtype=argument.dtype, device="cuda")
        return view.set_(there, argument.storage_offset(), argument.shape, argument.stride())

    def back(self) -> None:
        for here, there in self.memories.values():
            here.copy_(there)
