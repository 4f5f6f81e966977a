"""From weights to 4-bit codes on a GPU: the largest magnitude of every block, then codes, then scales in 8 bits.

Three kernels are the three steps of `nf4.quantize`, and give the same bits: every number they compute is one
operation that is rounded correctly, or a choice among stored ones. The level nearest to a value follows from how many
midpoints between levels lie below it; four halvings count them among sixteen levels, and eight among the 256 entries
that scales are stored as. Codebooks that do not have 4 bits are left to nf4, and
the search for scales is nf4's own.
"""

import math
from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32, Shaped, UInt8
from torch import Tensor

from kernels.launch import Launch, Shipped, ceil_div
from nf4 import QuantConfig, QuantizedTensor, code_bits
from nf4.blockwise import INPUT_DTYPES, Steps, quantize_by
from nf4.codebook import ascending
from nf4.double_quant import Nested, check_finite
from nf4.dynamic import entry_midpoints
from nf4.search import search_scales, squared_errors

WIDEST = 4096  # scales or weights that one program takes as a block
ABSMAX_TILE = 4096  # weights of one program, or one block if that is larger
GROUP = 8  # weights coded together: 16 bytes of a 16-bit type

# Nothing here may be fused: a rounding left out is another bit.
ABSMAX = Launch({}, num_warps=4, fp_fusion=False)
ENCODE = Launch({"TILE": 2048}, num_warps=4, fp_fusion=False)
NESTED = Launch({}, num_warps=4, fp_fusion=False)


def accepts(weight: Shaped[Tensor, "..."], config: QuantConfig) -> bool:
    """Whether this form stores the weight; another is nf4's."""
    sizes_fit = config.block_size <= WIDEST and (not config.double_quant or config.nested_block_size <= WIDEST)
    return weight.dtype in INPUT_DTYPES and weight.numel() > 0 and code_bits(config.codebook) == 4 and sizes_fit


def quantize(
    weight: Shaped[Tensor, "..."], config: QuantConfig = QuantConfig(), *, name: str = "weight"
) -> QuantizedTensor:
    """Round every weight to the nearest level of its block.

    A weight halfway between two levels takes the lower one, and a block of zeros the code of zero, so that it
    decodes to exactly 0 whatever becomes of its scale. `name` is what an error message calls the weight.
    """
    return quantize_by(STEPS, weight, config, name)


def block_absmax(flat: Float[Tensor, " n"], block_size: int) -> Float[Tensor, " num_blocks"]:
    """The largest magnitude in each block, as float32; infinity where a weight is not finite.

    A partial last block of zeros has 1e-38, as bitsandbytes writes it; any other block of zeros has 0.
    """
    absmax = torch.empty(ceil_div(len(flat), block_size), dtype=torch.float32, device=flat.device)
    columns = power_of_2(block_size)
    rows = max(ABSMAX_TILE // columns, 1)
    absmax_kernel[(ceil_div(len(absmax), rows),)](
        flat, absmax, len(flat), **ABSMAX.options(BLOCK_SIZE=block_size, ROWS=rows, COLUMNS=columns)
    )
    return absmax


def encode(
    flat: Float[Tensor, " n"], scales: Float[Tensor, " num_blocks"], config: QuantConfig
) -> UInt8[Tensor, " bytes"]:
    """The packed codes of the levels nearest to each weight over its block's scale."""
    midpoints, codes = tables_on(config.codebook, flat.device)
    packed = torch.empty(ceil_div(len(flat), 2), dtype=torch.uint8, device=flat.device)
    encode_kernel[(ceil_div(len(flat), ENCODE.constants["TILE"]),)](
        flat,
        scales,
        midpoints,
        codes,
        packed,
        len(flat),
        len(packed),
        **ENCODE.options(BLOCK_SIZE=config.block_size, SHARED_SCALE=config.block_size % GROUP == 0, GROUP=GROUP),
    )
    return packed


def quantize_absmax(absmax: Float[Tensor, " num_blocks"], nested_block_size: int = 256) -> Nested:
    """Codes, second-level scales and offset of a vector of scales; each code is the exact nearest entry."""
    offset = absmax.mean()
    codes = torch.empty(absmax.shape, dtype=torch.uint8, device=absmax.device)
    nested_absmax = absmax.new_empty(ceil_div(len(absmax), nested_block_size))
    nested_kernel[(len(nested_absmax),)](
        absmax,
        offset,
        entry_midpoints(absmax.device),
        codes,
        nested_absmax,
        len(absmax),
        **NESTED.options(NESTED_BLOCK_SIZE=nested_block_size, COLUMNS=power_of_2(nested_block_size)),
    )
    check_finite(absmax, nested_absmax)
    return codes, nested_absmax, offset


@triton.jit
def absmax_kernel(
    weight_ptr,  # (n,)
    absmax_ptr,  # (num_blocks,)
    n,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS blocks."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)[None, :]
    i = block[:, None] * BLOCK_SIZE + k
    inside = i < n if BLOCK_SIZE == COLUMNS else (i < n) & (k < BLOCK_SIZE)
    magnitude = tl.abs(tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32))
    absmax = tl.max(tl.where(magnitude < float("inf"), magnitude, float("inf")), axis=1)  # also of NaN
    partial = (block + 1) * BLOCK_SIZE > n
    absmax = tl.where(partial, tl.maximum(absmax, tl.full((), 1e-38, tl.float32)), absmax)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCK_SIZE < n)


@triton.jit
def encode_kernel(
    weight_ptr,  # (n,)
    scales_ptr,  # (num_blocks,) float32; one that was searched for may be negative
    midpoints_ptr,  # (16,) between levels in ascending order, then infinity
    codes_ptr,  # (16,) of the levels in ascending order
    packed_ptr,  # (bytes,)
    n,
    num_bytes,
    BLOCK_SIZE: tl.constexpr,
    SHARED_SCALE: tl.constexpr,  # the weights of a group have one scale
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """(TILE / GROUP, GROUP) weights. Past the last one is zero, whose code fills up a byte."""
    start = tl.program_id(0).to(tl.int64) * TILE
    group = tl.arange(0, TILE // GROUP)[:, None]
    i = start + group * GROUP + tl.arange(0, GROUP)[None, :]
    w = tl.load(weight_ptr + i, mask=i < n, other=0.0).to(tl.float32)

    scaled = start + group * GROUP if SHARED_SCALE else i  # the weights whose scale is looked up
    scale = tl.load(scales_ptr + scaled // BLOCK_SIZE, mask=scaled < n, other=1.0)
    # 1e-38 keeps a block of zeros zero, and the reciprocal of every other scale finite.
    size = tl.maximum(tl.abs(scale), tl.full((), 1e-38, tl.float32))
    scale = tl.where(scale.to(tl.int32, bitcast=True) < 0, -size, size)  # -0 is negative
    value = w * tl.div_rn(tl.full((), 1.0, tl.float32), scale)
    if start + TILE > n // BLOCK_SIZE * BLOCK_SIZE:  # the stored format divides in a partial last block
        value = tl.where(i < n // BLOCK_SIZE * BLOCK_SIZE, value, tl.div_rn(w, scale + tl.zeros_like(w)))

    # How many midpoints lie below: the outermost are inside of -1 and 1, so rounding past those does no harm.
    value = tl.reshape(value, (TILE,))
    midpoints = tl.load(midpoints_ptr + tl.arange(0, 16))
    below = tl.zeros((TILE,), tl.int32)
    for halving in tl.static_range(4):
        middle = below + ((8 >> halving) - 1)
        below += tl.where(value > tl.gather(midpoints, middle, 0), 8 >> halving, 0)
    code = tl.gather(tl.load(codes_ptr + tl.arange(0, 16)), below, 0)

    high, low = tl.split(tl.reshape(code, (TILE // GROUP, GROUP // 2, 2)))
    pair = start // 2 + group * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
    tl.store(packed_ptr + pair, (high << 4 | low).to(tl.uint8), mask=pair < num_bytes)


@triton.jit
def nested_kernel(
    absmax_ptr,  # (num_blocks,)
    offset_ptr,  # ()
    midpoints_ptr,  # (255,) float64, between the entries of the dynamic map
    codes_ptr,  # (num_blocks,)
    nested_ptr,  # (num_nested_blocks,)
    num_blocks,
    NESTED_BLOCK_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One second-level block. In float64, so that no rounding carries a ratio across a midpoint."""
    k = tl.arange(0, COLUMNS)
    block = tl.program_id(0).to(tl.int64) * NESTED_BLOCK_SIZE + k
    inside = (block < num_blocks) & (k < NESTED_BLOCK_SIZE)
    centred = tl.where(inside, tl.load(absmax_ptr + block, mask=inside, other=0.0) - tl.load(offset_ptr), 0.0)
    nested = tl.max(tl.abs(centred), axis=0)
    tl.store(nested_ptr + tl.program_id(0), nested)

    ratio = centred.to(tl.float64) / tl.maximum(nested.to(tl.float64), tl.full((), 1e-300, tl.float64))
    below = tl.zeros((COLUMNS,), tl.int32)
    for halving in tl.static_range(8):
        middle = below + ((128 >> halving) - 1)
        below += tl.where(ratio > tl.load(midpoints_ptr + middle), 128 >> halving, 0)
    tl.store(codes_ptr + block, below.to(tl.uint8), mask=inside)


def shipped() -> list[Shipped]:
    """What may be launched on real weights. A block size changes how absmax is found; codes only shift by it."""
    absmax = [
        Shipped(
            name=f"absmax, blocks of {block_size}",
            kernel=absmax_kernel,
            signature={"weight_ptr": "*bf16", "absmax_ptr": "*fp32", "n": "i32"},
            launch=replace(
                ABSMAX,
                constants={"BLOCK_SIZE": block_size, "ROWS": ABSMAX_TILE // block_size, "COLUMNS": block_size},
            ),
            aligned=("weight_ptr", "absmax_ptr", "n"),
            weights_per_thread=ABSMAX_TILE / (32 * ABSMAX.num_warps),
            instructions={80: 14.5, 90: 13.0},
        )
        for block_size in (32, 64, 128, 256)
    ]
    tables = {"scales_ptr": "*fp32", "midpoints_ptr": "*fp32", "codes_ptr": "*i32"}
    encoding = Shipped(
        name="encode, blocks of 64",
        kernel=encode_kernel,
        signature={"weight_ptr": "*bf16", **tables, "packed_ptr": "*u8", "n": "i32", "num_bytes": "i32"},
        launch=replace(ENCODE, constants={**ENCODE.constants, "BLOCK_SIZE": 64, "SHARED_SCALE": True, "GROUP": GROUP}),
        aligned=("weight_ptr", *tables, "packed_ptr", "n", "num_bytes"),
        weights_per_thread=ENCODE.constants["TILE"] / (32 * ENCODE.num_warps),
        instructions={80: 55.0, 90: 56.5},  # 25 of them divide, and run in a partial last block alone
    )
    pointers = {"absmax_ptr": "*fp32", "midpoints_ptr": "*fp64", "codes_ptr": "*u8", "nested_ptr": "*fp32"}
    nested = Shipped(
        name="scales in 8 bits, blocks of 256",
        kernel=nested_kernel,
        signature={**pointers, "offset_ptr": "*fp32", "num_blocks": "i32"},
        launch=replace(NESTED, constants={"NESTED_BLOCK_SIZE": 256, "COLUMNS": 256}),
        aligned=(*pointers, "num_blocks"),
    )
    return [*absmax, encoding, nested]


def power_of_2(n: int) -> int:
    """The lowest power of two that is not below n: how long a kernel's axis may be."""
    return 1 << (n - 1).bit_length()


@lru_cache
def tables_on(name: str, device: torch.device) -> tuple[Float[Tensor, "16"], Int32[Tensor, "16"]]:
    """Between which values a level is the nearest, in ascending order, and the codes of the levels."""
    with torch.inference_mode(False), torch.device("cpu"):
        levels, codes = ascending(name)
        midpoints = (levels[:-1] + levels[1:]) / 2
        midpoints = torch.cat([midpoints, torch.full((16 - len(midpoints),), math.inf)])
        codes = torch.cat([codes, codes.new_zeros(16 - len(codes))])
        return midpoints.to(device), codes.to(device, torch.int32)


STEPS = Steps(block_absmax, search_scales, squared_errors, quantize_absmax, encode)
