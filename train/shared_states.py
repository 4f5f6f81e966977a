"""Optimizer states that several processes share: whole on the way to a file, and cut anew on the way back.

A state has the shape of its parameter, so processes have their rows of it, and the rows one after the other are what a
process alone would have. Scales of 8-bit states are the exception. They belong to blocks of 256 numbers, which follow
one another in the rows of one process; a block ends where its rows end:

    a parameter of 5 rows, 200 numbers each       | row 0 | row 1 | row 2 | row 3 | row 4 |
    its blocks in one process                     |    0    |    1    |    2    |   3     |
    its blocks in two, of rows 0 to 2 and 3 to 4  |    0    |    1    | 2 |    3    |  4  |

So a file has to say on how many processes its scales were made. A process whose rows are those of one of them gets its
bytes back; any other has its states decoded, and they are encoded anew in its own blocks.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.updates import STATE_BLOCK
from models.errors import CheckpointError
from models.parallel import shares, world
from models.readers import SafetensorsReader
from nf4 import dequantize_dynamic
from train.paged.adamw import SIGNED


@dataclass(frozen=True)
class Cut:
    """How the numbers of a parameter, and the blocks of its states, lie on so many processes."""

    shape: tuple[int, ...]
    shards: int

    def rows(self, shard: int) -> range:
        """The rows of one process; a single number is a row."""
        return shares.rows(self.shape[0] if self.shape else 1, shard, self.shards)

    def numbers(self, rows: range) -> range:
        """Where in the flattened parameter some rows are."""
        width = torch.Size(self.shape[1:]).numel()
        return range(rows.start * width, rows.stop * width)

    def blocks(self, shard: int) -> range:
        """Where the blocks of one process are among those of all, which follow one another."""
        counts = [-(-len(self.numbers(self.rows(other))) // STATE_BLOCK) for other in range(self.shards)]
        ends = list(accumulate(counts, initial=0))
        return range(ends[shard], ends[shard + 1])


def is_scale(key: str) -> bool:
    """Whether a state has an entry for each block, and not for each number."""
    return key.endswith("_absmax")


def collected(key: str, mine: Tensor, parameter: Tensor) -> Tensor | None:
    """The whole of a parameter's state in the CPU's memory of the main process; None on the others.

    Of a shared parameter all processes have to ask for it, in the same order.
    """
    mine = mine.detach().to("cpu", copy=True)
    if not shares.is_shared(parameter) or key == "step":
        return mine if world.is_main() else None
    cut = Cut(tuple(parameter.shape), world.size())
    parts = [cut.blocks(rank) if is_scale(key) else cut.numbers(cut.rows(rank)) for rank in range(world.size())]
    flat = joined(mine.reshape(-1), [len(part) for part in parts])
    return flat if flat is None or is_scale(key) else flat.view(parameter.shape)


def joined(mine: Tensor, lengths: Sequence[int]) -> Tensor | None:
    """The pieces of all processes behind one another, on the main process."""
    assert len(mine) == lengths[world.rank()], f"{len(mine)} entries came where {lengths[world.rank()]} are expected"
    if not world.is_main():
        if len(mine):
            dist.send(mine, dst=0)
        return None
    whole = mine.new_empty(sum(lengths))
    for rank, part in enumerate(whole.split(list(lengths))):
        if rank == 0:
            part.copy_(mine)
        elif len(part):
            dist.recv(part, src=rank)
    return whole


def own_states(
    reader: SafetensorsReader, name: str, keys: Collection[str], parameter: Tensor, shards: int
) -> dict[str, Tensor]:
    """This process's part of the states of a parameter, in a file that was written by so many processes.

    Nothing else is read. States of 8 bits come decoded where they lie in other blocks here.
    """
    cut = Cut(tuple(parameter.shape), shards)
    here = (world.rank(), world.size()) if shares.is_shared(parameter) else (0, 1)
    rows = Cut(cut.shape, here[1]).rows(here[0])
    same = next((shard for shard in range(shards) if cut.rows(shard) == rows), None)
    states: dict[str, Tensor] = {}
    for key in keys:
        if key == "step" or not cut.shape:
            states[key] = reader.read(f"{name}.{key}")
        elif not is_scale(key):
            states[key] = entries(reader, f"{name}.{key}", cut.shape, rows)
        elif same is not None:
            states[key] = entries(reader, f"{name}.{key}", (cut.blocks(shards - 1).stop,), cut.blocks(same))
    if same is None:
        for key in filter(is_scale, keys):
            coded = key.removesuffix("_absmax")
            states[coded] = decoded(reader, f"{name}.{key}", states[coded], cut, cut.numbers(rows), SIGNED[coded])
    return states


def decoded(reader: SafetensorsReader, name: str, codes: Tensor, cut: Cut, numbers: range, signed: bool) -> Tensor:
    """The float32 values of some numbers of a parameter, whose scales are under that name in the file."""
    values = torch.empty(codes.shape, dtype=torch.float32)
    for shard in range(cut.shards):
        theirs, blocks = cut.numbers(cut.rows(shard)), cut.blocks(shard)
        common = range(max(theirs.start, numbers.start), min(theirs.stop, numbers.stop))
        if not common:
            continue
        first, before = divmod(common.start - theirs.start, STATE_BLOCK)
        last = -(-(common.stop - theirs.start) // STATE_BLOCK)
        scales = entries(reader, name, (cut.blocks(cut.shards - 1).stop,), blocks[first:last])
        place = slice(common.start - numbers.start, common.stop - numbers.start)
        padded = torch.nn.functional.pad(codes.view(-1)[place], (before, 0))  # so that they begin where a block does
        values.view(-1)[place] = dequantize_dynamic(padded, scales, STATE_BLOCK, signed)[before:]
    return values


def entries(reader: SafetensorsReader, name: str, shape: tuple[int, ...], rows: range) -> Tensor:
    """Some rows of a tensor, which has to be of this shape."""
    found = reader.shapes.get(name)
    if found != shape:
        came = "is not there" if found is None else f"is {list(found)}"
        raise CheckpointError(f"{reader.where(name)}: {name} {came}, expected {list(shape)}")
    return reader.read_rows(name, rows.start, rows.stop)
