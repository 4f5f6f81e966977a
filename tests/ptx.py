"""The few PTX instructions that decoding uses, on arrays of 32-bit words: inline PTX read without a GPU."""

import re

import numpy as np

Words = np.ndarray


def run(text: str, inputs: dict[str, Words], outputs: list[str]) -> list[Words]:
    """The registers `outputs` after a block of PTX; an instruction that is not known here is a KeyError."""
    registers = {name: value.astype(np.uint32) for name, value in inputs.items()}
    (shape,) = {value.shape for value in registers.values()}
    declared = set(inputs) | set(outputs)
    for statement in re.split(r"[;\n]", text.strip().removeprefix("{").removesuffix("}")):
        operation, _, rest = statement.strip().partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        if operation == ".reg":
            declared |= set(rest.removeprefix(".b32").replace(" ", "").split(","))
        elif operation:
            target, *sources = operands
            if target not in declared:
                raise ValueError(f"every register is declared before it is written, but {target} was not")
            values = [read(source, registers, shape) for source in sources]
            registers[target] = INSTRUCTIONS[operation](*values)
    return [registers[name] for name in outputs]


def read(operand: str, registers: dict[str, Words], shape: tuple[int, ...]) -> Words:
    """A register, or a number written out."""
    return registers[operand] if operand in registers else np.full(shape, int(operand, 0), np.uint32)


def prmt(a: Words, b: Words, selector: Words) -> Words:
    """Byte i of the result is one of the eight bytes of b:a, by nibble i; its bit 3 spreads the byte's sign instead."""
    source = np.stack([(word >> np.uint32(8 * i)) & 0xFF for word in (a, b) for i in range(4)])
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & 0xF
        byte = np.take_along_axis(source, (nibble & 7)[None].astype(np.int64), 0)[0]
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    return result


def lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Bit by bit, the entry of an 8-bit truth table at a b c."""
    result = np.zeros_like(a)
    for entry in range(8):
        if int(table.flat[0]) >> entry & 1:
            result |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
    return result


def halves(function, *words: Words) -> Words:
    """A function of float32 on each 16-bit half, which `function` reads from and rounds to bits."""
    low = function(*(word & 0xFFFF for word in words))
    return low | (function(*(word >> np.uint32(16) for word in words)) << np.uint32(16))


def fma_bf16(a: Words, b: Words, c: Words) -> Words:
    wide = [(bits << np.uint32(16)).view(np.float32).astype(np.float64) for bits in (a, b, c)]
    exact = (wide[0] * wide[1] + wide[2]).astype(np.float32)  # a product of two bfloat16 and a zero is exact
    bits = exact.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(exact), np.uint32(0x7FFF), nearest).astype(np.uint32)


def fma_fp16(a: Words, b: Words, c: Words) -> Words:
    wide = [bits.astype(np.uint16).view(np.float16).astype(np.float64) for bits in (a, b, c)]
    with np.errstate(over="ignore"):
        result = (wide[0] * wide[1] + wide[2]).astype(np.float16)
    return np.where(np.isnan(result), np.uint16(0x7FFF), result.view(np.uint16)).astype(np.uint32)


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "fma.rn.bf16x2": lambda *words: halves(fma_bf16, *words),
    "fma.rn.f16x2": lambda *words: halves(fma_fp16, *words),
}
