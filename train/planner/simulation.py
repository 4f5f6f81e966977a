"""The real code of a step, run on tensors without memory, with every storage entered into a ledger.

Floating-point tensors are on "meta": they have shapes and no values. Small tensors of integers and booleans, such as
the tokens of a batch and the masks that follow from them, keep their values, because code asks for them. An operator
of this project runs its own Python on them (`kernels/planned.py`), one of torch's its shape function. Where torch
takes another way on each type of device, the way of the device that is planned for is taken here.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import _maybe_get_opdef
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import dense
from kernels.planned import in_backward, stand, standing_for
from train.planner.ledger import Ledger

aten = torch.ops.aten

LOGITS = "logits"
DECODED = "decoded weights"
CPUINFO = Path("/proc/cpuinfo")
CUDA_GRANULARITY = 512  # bytes that torch's allocator gives at least, and in multiples of which it counts
LARGEST_WITH_VALUES = 2**22  # entries of a tensor of integers that is worth computing


@contextmanager
def simulated(kind: str) -> Iterator[Ledger]:
    """A time in which what this thread computes on "meta" is counted as it would be on a "cpu" or "cuda" device."""
    ledger = Ledger(CUDA_GRANULARITY if kind == "cuda" else 1)
    with ExitStack() as stack:
        stack.enter_context(standing_for(kind))
        stack.enter_context(own_workspaces())
        stack.enter_context(ways_of(kind))
        stack.enter_context(Counting(ledger, kind))
        yield ledger
        ledger.settle()


@contextmanager
def own_workspaces() -> Iterator[None]:
    """A time with workspaces for decoded weights of its own."""
    before = dense.workspaces.__dict__.pop("held", None)
    try:
        yield
    finally:
        dense.workspaces.__dict__.pop("held", None)
        if before is not None:
            dense.workspaces.held = before


class Counting(TorchDispatchMode):
    """Runs each operator on what there is of its arguments, and enters what comes out into the ledger."""

    def __init__(self, ledger: Ledger, kind: str) -> None:
        super().__init__()
        self.ledger, self.kind, self.inside = ledger, kind, False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        own = _maybe_get_opdef(func) if func.namespace == "qlora" else None
        if own is not None:
            # What torch would call on a device: the operator's Python, whose allocations then pass through here.
            with torch.no_grad(), self, self.labelled(func):
                return own._init_fn(*args, **kwargs)
        if func is aten.add.Tensor and in_backward() and not torch.is_grad_enabled() and not self.inside:
            taken = accumulated(*args)
            if taken is not None:
                return taken
        extra = TEMPORARIES.get((self.kind, func))
        out = computed(func, args, kwargs)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.ledger.note(tensor)
        if extra is not None:
            self.ledger.reach(extra(*args, **kwargs))
        return out

    @contextmanager
    def labelled(self, func: Any) -> Iterator[None]:
        before, self.inside = (self.ledger.label, self.inside), True
        if func._opname == "linear_cross_entropy":
            self.ledger.label = LOGITS
        try:
            yield
        finally:
            self.ledger.label, self.inside = before


ALONE = 2  # who holds a storage of which there is one tensor: that tensor, and here the storage's own object


def accumulated(one: Tensor, other: Any) -> Tensor | None:
    """The sum of two gradients, if autograd would add one into the memory of the other.

    It does where nobody else holds that; but while a mode is in force, as in a plan, it always makes a third.
    """
    if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
        return None
    for tensor in (one, other):
        if tensor.is_meta and torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) == ALONE:
            return tensor
    return None


def computed(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operator gives, with values where its arguments have them and they are few."""
    device = kwargs.get("device")
    if func is aten._local_scalar_dense.default and args[0].is_meta:
        return {torch.bool: False}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
    if func is aten._to_copy.default and device is not None:
        onto_meta = torch.device(device).type == "meta"
        stays = args[0].is_meta or (onto_meta and not args[0].is_floating_point())
        if stays:
            kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
    given = list(tensors(args)) + list(tensors(kwargs.values()))
    if not any(t.is_meta for t in given):
        return func(*args, **kwargs)
    if func is aten.index.Tensor:  # which rows a mask leaves is a matter of values
        args = (args[0], [i for index in args[1] for i in positions(index)], *args[2:])
    on_meta = shaped(func, tuple(map(without_values, args)), {name: without_values(v) for name, v in kwargs.items()})
    target = given[0]
    in_place = func._schema.is_mutable and not target.is_meta and isinstance(on_meta, Tensor)
    return target if in_place else on_meta


known: dict[Any, tuple[Any, ...]] = {}
"""Sizes, strides and dtype of what operators gave, by their arguments."""


def shaped(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operator gives for tensors on "meta": by torch's shape function, or as it was for others of such shapes.

    A step asks the same hundreds of times, and torch answers in Python. Views, which share memory with what they are
    of, are always asked for, and so is what gives more than one tensor.
    """
    kind = kind_of_result(func)
    key = None if kind is None else (func, described(args), described(tuple(kwargs.items())))
    found = known.get(key)
    if found is not None:
        return args[0] if kind == "in place" else torch.empty_strided(*found[:2], dtype=found[2], device="meta")
    out = func(*args, **kwargs)
    if kind == "in place" or (kind == "new" and own_memory(out, args)):
        known[key] = (out.shape, out.stride(), out.dtype)
    return out


@cache
def kind_of_result(func: Any) -> str | None:
    """Whether an operator gives one "new" tensor or its first argument, changed "in place"; None for all else."""
    schema = func._schema
    if len(schema.returns) != 1 or str(schema.returns[0].type) != "Tensor":
        return None
    written = [i for i, argument in enumerate(schema.arguments) if argument.is_write]
    if schema.returns[0].alias_info is None:
        return "new" if not written else None
    return "in place" if written == [0] and schema.returns[0].alias_info.is_write else None


def described(value: Any) -> Any:
    """All of an argument that a shape can depend on. (1, 1.0 and True are equal but give other dtypes.)"""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, tuple | list):
        return tuple(map(described, value))
    return type(value), value


def own_memory(out: Tensor, args: tuple) -> bool:
    """Does a result fill memory of its own? (Some of torch's views are not declared as such.)"""
    storage = out.untyped_storage()
    reach = sum((size - 1) * stride for size, stride in zip(out.shape, out.stride(), strict=True))
    whole = storage.nbytes() == ((reach + 1) * out.dtype.itemsize if out.numel() else 0)
    return whole and all(t.untyped_storage()._cdata != storage._cdata for t in tensors(args))


def tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors(value)


def without_values(value: Any) -> Any:
    """An argument with its tensors on "meta"."""
    if isinstance(value, Tensor):
        return value if value.is_meta else value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(map(without_values, value))
    return torch.device("meta") if isinstance(value, torch.device) else value


def positions(index: Tensor | None) -> tuple[Tensor | None, ...]:
    """An index as numbers of rows, one tensor for each axis that it stands for."""
    if index is None or index.is_meta or index.dtype != torch.bool:
        return (index,)
    return index.nonzero(as_tuple=True)


# Ways that depend on the device


@contextmanager
def ways_of(kind: str) -> Iterator[None]:
    """A time in which this thread goes through torch's own functions the way that the device would go.

    (They are replaced by name, since a mode of torch is not in force while backward computes a block again.)
    """
    plain_attention, plain_dropout = F.scaled_dot_product_attention, F.dropout

    def attended(q: Tensor, *others: Any, **options: Any) -> Tensor:
        planned = q.is_meta and stand.kind is not None
        return attention(kind, q, *others, **options) if planned else plain_attention(q, *others, **options)

    def dropped(x: Tensor, *others: Any, **options: Any) -> Tensor:
        planned = x.is_meta and stand.kind == "cuda"
        return dropout(x, *others, **options) if planned else plain_dropout(x, *others, **options)

    F.scaled_dot_product_attention, F.dropout = attended, dropped
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.dropout = plain_attention, plain_dropout


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """On a GPU one kernel, which keeps a mask of booleans."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def attention(
    kind: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernel that the device would choose."""
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:  # torch makes it a number for each score
        mask = torch.zeros(mask.shape, dtype=q.dtype, device="meta").masked_fill(~mask, -math.inf)
    choice = chosen_on_cpu if kind == "cpu" else chosen_on_gpu
    name = choice(q, k, v, mask, dropout_p, is_causal, enable_gqa)
    if name == "flash" and kind == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale
        )[0]
    if name == "flash":
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if name == "efficient":
        bias = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
        keep = q.requires_grad or k.requires_grad or v.requires_grad
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, keep, dropout_p, is_causal, scale=scale)[0]
    return aten._scaled_dot_product_attention_math(
        q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def chosen_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> str:
    """The way that torch itself takes for tensors of these shapes, which nobody fills."""
    with torch._C._DisableTorchDispatch():
        q, k, v = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, requires_grad=t.requires_grad) for t in (q, k, v)
        ]
        bias = None
        if mask is not None:
            bias = torch.empty_strided(mask.shape, mask.stride(), dtype=mask.dtype, requires_grad=mask.requires_grad)
        choice = torch._fused_sdp_choice(q, k, v, bias, dropout_p, is_causal, enable_gqa=enable_gqa)
    return "flash" if choice == 1 else "math"


def chosen_on_gpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> str:
    """The rule of torch on GPUs since Ampere: what keeps no scores, where it takes the arguments."""
    if q.dtype in (torch.bfloat16, torch.float16) and mask is None and q.shape[-1] <= 256:
        return "flash"
    grouped = q.shape[1] != k.shape[1]
    return "math" if q.dtype == torch.float64 or grouped else "efficient"


# What torch's operators take for themselves while they run, in bytes: no result shows it.

Temporary = Callable[..., int]


def drawn_as_integers(x: Tensor, *_: Any, **__: Any) -> int:
    """On Intel's CPUs torch has their own library draw coin tosses, which writes 32-bit integers."""
    return 4 * x.numel() if intel() and x.dtype != torch.int32 else 0


@cache
def intel() -> bool:
    return CPUINFO.exists() and "GenuineIntel" in CPUINFO.read_text()


TEMPORARIES: dict[tuple[str, Any], Temporary] = {
    ("cpu", aten.bernoulli_.float): drawn_as_integers,
}
