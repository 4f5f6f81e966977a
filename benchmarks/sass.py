"""Reading what a GPU will run: the listing of a compiled kernel's machine instructions.

    .L_x_1:
            /*0a20*/                   LDS.128 R8, [R4] ;
            /*0a30*/              @!P0 BRA `(.L_x_1) ;

An instruction has an address, maybe a predicate, an operation with its modifiers, and operands. A branch to a label
at or before itself closes a loop. The main loop is the one that multiplies most; where nothing multiplies on
matrices it is the longest, and a kernel without a loop counts whole.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

LABEL = re.compile(r"^\s*(\.L[\w$.]*):")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)$")
TARGET = re.compile(r"`\((\.L[\w$.]*)\)")
SPILLS = ("STL", "LDL")  # to and from local memory, where registers go that there is no room for
WARPGROUP = ("HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA")  # products issued for four warps at once


class Instruction(NamedTuple):
    """One line of the listing."""

    operation: str
    operands: str

    @property
    def name(self) -> str:
        """The operation without its modifiers."""
        return self.operation.partition(".")[0]


class Loop(NamedTuple):
    """The first and last instruction of a loop."""

    first: int
    last: int


def read(listing: str) -> tuple[list[Instruction], list[Loop]]:
    """The instructions of a listing in order, and its loops; one that only jumps to itself is no loop."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    loops = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            here = len(instructions)
            instructions.append(Instruction(found[2], found[3]))
            target = TARGET.search(found[3]) if found[2].startswith("BRA") else None
            start = labels.get(target[1]) if target else None
            if start is not None and start < here:
                loops.append(Loop(start, here))
    return instructions, loops


def main_loop(instructions: Sequence[Instruction], loops: Sequence[Loop]) -> Sequence[Instruction]:
    """The loop with the most matrix products, of those the shortest; without products the longest."""
    bodies = [instructions[loop.first : loop.last + 1] for loop in loops]
    if not bodies:
        return instructions
    products = [sum("MMA" in i.name for i in body) for body in bodies]
    if max(products) == 0:
        return max(bodies, key=len)
    return min((body for body, count in zip(bodies, products, strict=True) if count == max(products)), key=len)


def work(body: Sequence[Instruction]) -> int:
    """Instructions that are neither matrix products nor padding."""
    return sum("MMA" not in i.name and i.name != "NOP" for i in body)


def spills(instructions: Sequence[Instruction]) -> int:
    """How many instructions move a register to memory or back for want of registers."""
    return sum(i.name in SPILLS for i in instructions)


def warpgroup(instructions: Sequence[Instruction]) -> bool:
    """Whether the products are those of four warps at once (wgmma, tcgen05): the only ones at full speed."""
    return any(i.name in WARPGROUP for i in instructions)
