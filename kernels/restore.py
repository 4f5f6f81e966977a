"""From 4-bit codes back to weights in one launch: the double quantization is undone on the way.

A thread reads four bytes of codes and writes eight weights, 16 bytes of a 16-bit type, so that both reads and writes
are as wide as the machine has them. Little arithmetic is left between: a lookup among sixteen levels, one product
with the block's scale in float32, which is exact enough to be the definition's, and one rounding. The time is that
of moving the bytes.
N outputs, K inputs.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

import nf4
from kernels.launch import Launch, Shipped, ceil_div
from nf4 import QuantizedTensor, code_bits, codebook
from nf4.blockwise import check_out, check_sizes
from nf4.dynamic import map_on

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
GROUP = 8  # weights decoded together: 16 bytes of a 16-bit type

# A scale is entry * nested + offset, each rounded, as every reader of the format computes it: a fused multiply-add,
# which rounds once, would give another last bit.
LAUNCHES = {
    "flat": Launch({"TILE": 4096}, num_warps=4, fp_fusion=False),
    "rows": Launch({"TILE": 2048}, num_warps=4, fp_fusion=False),  # rows of a wider matrix may be as short as 576
}

# Instructions per weight, of the whole kernel: reading half a byte and writing two at full speed leaves time for 24.
INSTRUCTIONS = {
    ("flat", True): {80: 13.0, 90: 13.5},
    ("flat", False): {80: 11.5, 90: 11.5},
    ("rows", True): {80: 15.0, 90: 15.5},
    ("rows", False): {80: 13.0, 90: 13.5},
}


def accepts(q: QuantizedTensor, dtype: torch.dtype | None = None) -> bool:
    """Whether this form decodes q: any codebook of 4 bits, to any type a model computes in."""
    return code_bits(q.config.codebook) == 4 and (dtype or q.dtype) in DTYPES


def dequantize(
    q: QuantizedTensor, dtype: torch.dtype | None = None, out: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """The weight that is stored: level times scale in float32, then one rounding to `dtype`.

    `out` is where to put it, of q's shape and `dtype`: contiguous, or for a matrix with rows that lie further apart
    than they are long. Without it memory is made.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    check_sizes(q)
    check_out(q, dtype, out)
    rows, columns, _ = layout(out)
    if out.numel() == 0:
        return out
    if rows > 1 and columns % 2:  # rows that begin in the middle of a byte
        return out.copy_(dequantize(q, out.dtype))
    decode_into(out, q, LAUNCHES["flat" if rows == 1 else "rows"])
    return out


def decode_into(out: Float[Tensor, "..."], q: QuantizedTensor, launch: Launch) -> None:
    """Run the kernel as `launch` says."""
    rows, columns, stride = layout(out)
    config = q.config
    nested = (q.absmax_codes, q.nested_absmax, map_on(q.device), q.absmax_offset)
    scales = (q.absmax,) * 4 if q.absmax is not None else nested
    tiles = ceil_div(columns, launch.constants["TILE"])
    dequantize_kernel[(rows * tiles,)](
        q.packed,
        *scales,
        levels_on(config.codebook, q.device),
        out,
        columns,
        ceil_div(columns, 2),
        stride,
        tiles,
        **launch.options(
            DOUBLE=q.absmax is None,
            BLOCK_SIZE=config.block_size,
            NESTED_BLOCK_SIZE=config.nested_block_size,
            SHARED_SCALE=config.block_size % GROUP == 0 and (rows == 1 or columns % GROUP == 0),
            GROUP=GROUP,
        ),
    )


@triton.jit
def dequantize_kernel(
    packed_ptr,  # (ceil(n / 2),) bytes, the earlier weight in the high nibble
    scales_ptr,  # (num_blocks,) float32 scales, or their 8-bit codes if DOUBLE
    nested_ptr,  # (num_nested_blocks,)
    map_ptr,  # (256,)
    offset_ptr,  # ()
    levels_ptr,  # (16,)
    out_ptr,  # (rows, columns)
    columns,
    pairs,  # bytes of one row
    stride,
    tiles,  # of one row
    DOUBLE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    SHARED_SCALE: tl.constexpr,  # the weights of a group have one scale
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of one row: (TILE / GROUP, GROUP) weights."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    group = tl.arange(0, TILE // GROUP)[:, None]

    pair = tile * (TILE // 2) + group * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    byte = tl.load(packed_ptr + row * pairs + pair, mask=pair < pairs, other=0)
    code = tl.interleave(byte >> 4, byte & 15).to(tl.int32)  # (TILE / GROUP, GROUP)
    levels = tl.load(levels_ptr + tl.arange(0, 16))
    level = tl.reshape(tl.gather(levels, tl.reshape(code, (TILE,)), 0), code.shape)

    k = tile * TILE + group * GROUP + tl.arange(0, GROUP)[None, :]
    scaled = tile * TILE + group * GROUP if SHARED_SCALE else k  # the weights whose scale is looked up
    block = (row * columns + scaled) // BLOCK_SIZE
    scale = tl.load(scales_ptr + block, mask=scaled < columns, other=0)
    if DOUBLE:
        nested = tl.load(nested_ptr + block // NESTED_BLOCK_SIZE, mask=scaled < columns, other=0.0)
        scale = tl.load(map_ptr + scale.to(tl.int32)) * nested + tl.load(offset_ptr)
    w = (level * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride + k, w, mask=k < columns)


def shipped() -> list[Shipped]:
    """What may be launched on real weights, into a workspace or into rows of one; block sizes but shift an index."""
    cases = [(name, 64, double) for name in LAUNCHES for double in (True, False)]
    return [shape_of(*case) for case in (*cases, ("flat", 32, True), ("flat", 256, True))]


def shape_of(name: str, block_size: int, double: bool) -> Shipped:
    launch = LAUNCHES[name]
    constants = {
        "DOUBLE": double,
        "BLOCK_SIZE": block_size,
        "NESTED_BLOCK_SIZE": 256,
        "SHARED_SCALE": True,
        "GROUP": GROUP,
    }
    signature = {
        "packed_ptr": "*u8",
        "scales_ptr": "*u8" if double else "*fp32",
        **dict.fromkeys(("nested_ptr", "map_ptr", "offset_ptr", "levels_ptr"), "*fp32"),
        "out_ptr": "*bf16",
        **dict.fromkeys(("columns", "pairs", "stride", "tiles"), "i32"),
    }
    return Shipped(
        name=f"dequantize {name}, blocks of {block_size}{', double' if double else ''}",
        kernel=dequantize_kernel,
        signature=signature,
        launch=replace(launch, constants={**constants, **launch.constants}),
        aligned=tuple(argument for argument in signature if argument not in ("tiles", "offset_ptr")),
        weights_per_thread=launch.constants["TILE"] / (32 * launch.num_warps),
        instructions=INSTRUCTIONS[name, double],
    )


def candidates() -> dict[str, list[Launch]]:
    """Launches worth timing for each row of the table."""
    launches = [Launch({"TILE": 1024 << i}, warps, fp_fusion=False) for i in range(5) for warps in (2, 4, 8)]
    return dict.fromkeys(LAUNCHES, launches)


def trial(row: str, launch: Launch) -> Callable[[], None]:
    """A call that decodes a usual weight so, for `benchmarks/tune.py`."""
    q = nf4.quantize(torch.randn(11008, 4096, device="cuda"))
    wide = torch.empty(11008, 4096 + (64 if row == "rows" else 0), dtype=torch.bfloat16, device="cuda")
    return lambda: decode_into(wide[:, :4096], q, launch)


def layout(out: Tensor) -> tuple[int, int, int]:
    """`out` as rows, columns and the distance of its rows; a contiguous tensor is one row."""
    if out.is_contiguous():
        return 1, out.numel(), out.numel()
    if out.ndim != 2 or out.stride(1) != 1 or out.stride(0) < out.shape[1]:
        raise ValueError(f"out must be contiguous or rows of a wider matrix, but its strides are {out.stride()}")
    return out.shape[0], out.shape[1], out.stride(0)


@lru_cache
def levels_on(name: str, device: torch.device) -> Float[Tensor, "16"]:
    """The levels of a 4-bit codebook on a device; a code that the data type does not use decodes to NaN."""
    with torch.inference_mode(False), torch.device("cpu"):
        levels = codebook(name)
        return torch.cat([levels, torch.full((16 - len(levels),), math.nan)]).to(device)
