"""Lists of tensors as one table, by which a single call in C or one launch on a GPU updates all of them.

A row of the table is one tensor's: its length, where the parameter, its gradient and its states lie, and the numbers
of the update in float32. LoRA trains hundreds of small matrices, so that a call for each would cost more than what it
computes.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from kernels.updates import PARAMETER_DTYPES, STATE_BLOCK, AdamWNumbers, LionNumbers, Tensors

# Length, addresses and numbers; C has it as `Update` in kernels/c/updates.c.
ADDRESSES = 6
ROW = struct.Struct(f"=q{ADDRESSES}q8f")
WORDS = ROW.size // 8
NUMBERS = 1 + ADDRESSES  # the word at which the numbers begin, two in each
ALIGNMENT = 16  # bytes that a GPU loads at once
STATES_8BIT = ("exp_avgs", "exp_avg_absmaxes", "exp_avg_sqs", "exp_avg_sq_absmaxes")

Numbers = AdamWNumbers | LionNumbers


@dataclass(frozen=True)
class Group:
    """The tensors of a list whose parameters, and whose gradients, have one dtype."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    sizes: list[int] = field(default_factory=list)
    table: bytearray = field(default_factory=bytearray)

    @property
    def aligned(self) -> bool:
        """Whether every address is a multiple of 16 bytes."""
        return not any(word % ALIGNMENT for row in ROW.iter_unpack(self.table) for word in row[1:NUMBERS])


def accepts(params: Tensors, grads: Tensors) -> bool:
    """Whether all parameters and gradients are of dtypes that the kernels take."""
    return all(tensor.dtype in PARAMETER_DTYPES for tensors in (params, grads) for tensor in tensors)


def grouped(
    params: Tensors,
    grads: Tensors,
    states: dict[str, Tensors],
    numbers: Sequence[Numbers],
    eight_bits: bool = False,
) -> list[Group]:
    """A table for each pair of dtypes. Empty tensors are left out.

    The tables hold addresses and the kernels trust them, so that here is where a tensor of the wrong size is refused.
    """
    lists = {"params": params, "grads": grads, **states}
    for name, given in {**lists, "numbers": numbers}.items():
        if len(given) != len(params):
            raise ValueError(f"an update takes lists of one length: {len(params)} params, but {len(given)} {name}")
    lengths = [p.numel() for p in params]
    blocks = [-(-length // STATE_BLOCK) for length in lengths]
    columns = []
    for name, tensors in lists.items():
        scales, is_state = name.endswith("absmaxes"), name in states
        dtype = (torch.uint8 if eight_bits and not scales else torch.float32) if is_state else None
        check(name, tensors, blocks if scales else lengths, dtype, params)
        columns.append([tensor.data_ptr() for tensor in tensors])
        if is_state and not eight_bits:
            columns.append([0] * len(params))  # float32 has no scales
    columns += [[0] * len(params)] * (ADDRESSES - len(columns))

    groups: dict[tuple[torch.dtype, torch.dtype], Group] = {}
    for p, g, length, n, *addresses in zip(params, grads, lengths, numbers, *columns, strict=True):
        dtypes = (p.dtype, g.dtype)
        if length:
            if dtypes not in groups:
                groups[dtypes] = Group(*dtypes)
            groups[dtypes].sizes.append(length)
            groups[dtypes].table.extend(ROW.pack(length, *addresses, *in_order(n)))
    # Written behind torch's back, so that it is told: a backward that still needs the old values is an error.
    torch.autograd.graph.increment_version([p for p in params if not p.is_inference()])
    return list(groups.values())


def check(name: str, tensors: Tensors, lengths: Sequence[int], dtype: torch.dtype | None, params: Tensors) -> None:
    """Refuse what is not contiguous, of this length and dtype (if it matters), and where the first parameter is."""
    device = params[0].device if params else None
    for i, (tensor, length) in enumerate(zip(tensors, lengths, strict=True)):
        fits = tensor.numel() == length and tensor.is_contiguous() and tensor.device == device
        if not fits or dtype not in (tensor.dtype, None):
            raise ValueError(
                f"{name}[{i}] must be {length} contiguous elements of {dtype or tensor.dtype} on {device}, "
                f"not {tensor.numel()} {'contiguous' if tensor.is_contiguous() else 'strided'} ones of {tensor.dtype} "
                f"on {tensor.device}"
            )


@lru_cache(maxsize=1024)
def in_order(n: Numbers) -> tuple[float, ...]:
    """The eight numbers of a row."""
    betas = (n.beta1, 1 - n.beta1, n.beta2, 1 - n.beta2)
    if isinstance(n, AdamWNumbers):
        return (*betas, n.step_size, 1 / n.correction, n.eps, n.decay)
    return (*betas, n.lr, 0.0, 0.0, n.decay)


@lru_cache(maxsize=1024)  # a window of paged states each, and one too few would make all of them anew at every step
def tiles(sizes: tuple[int, ...], tile: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which row of the table each program of a launch works on, and on which tile of that tensor; both int32."""
    with torch.inference_mode(False), torch.device("cpu"):
        counts = torch.tensor([-(-size // tile) for size in sizes])
        rows = torch.arange(len(sizes)).repeat_interleave(counts)
        first = (counts.cumsum(0) - counts).repeat_interleave(counts)
        within = torch.arange(len(rows)) - first
        return rows.int().to(device), within.int().to(device)


def launches(
    groups: Sequence[Group], tile: int, device: torch.device
) -> Iterator[tuple[Group, Tensor, Tensor, Tensor]]:
    """Each group with what a launch needs on its device: the table, and for every program its row and its tile.

    The table is copied from pinned memory, which torch keeps until the copy is done, so that nothing waits.
    """
    for group in groups:
        table = torch.frombuffer(group.table, dtype=torch.int64)
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)
        yield (group, table, *tiles(tuple(group.sizes), tile, device))
