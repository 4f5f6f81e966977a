"""The operators on a CPU, in C: what is handed to `kernels/c` and what comes back.

Every function computes what the definition of its name computes, bit for bit where that defines bits; sums of
products may be taken in another order. What C does not take (codes of 2, 3 or 8 bits, odd block sizes) is for
`accepts_...` to say.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Float64, Shaped, UInt8
from torch import Tensor

from kernels import reference
from kernels.cpu_build import Codebook, Scales, capabilities, library
from kernels.planned import Unrun, stand
from nf4 import QuantConfig, QuantizedTensor
from nf4.blockwise import Steps, check_out, check_sizes, quantize_by
from nf4.codebook import ascending, code_bits, levels_of, zero_code
from nf4.double_quant import Nested, check_finite, without_mean
from nf4.dynamic import entry_midpoints, map_on
from nf4.search import GRID, REFITS, candidate_table

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as common.h counts them
FEW = 24  # tokens up to which decoding W for every eight of them beats decoding it to memory
MANY = 512  # tokens up to which decoding it to panels in the cache does, where C multiplies those
PANELS = 12  # tokens above which panels beat decoding W for every eight


def accepts_stored(q: QuantizedTensor, dtype: torch.dtype | None = None) -> bool:
    """Is this weight one that C decodes?"""
    return library() is not None and code_bits(q.config.codebook) == 4 and (dtype or q.dtype) in DTYPES


def accepts_weight(weight: Tensor, config: QuantConfig) -> bool:
    """Is this weight one that C encodes?"""
    return library() is not None and code_bits(config.codebook) == 4 and config.block_size % 2 == 0


def accepts_product(x: Tensor, q: QuantizedTensor) -> bool:
    """Not too many tokens, and runs of at least 32 inputs that share a scale in every row."""
    few = x.dtype in DTYPES and 0 < x.shape[0] <= (MANY if has_panels(x.dtype) else FEW)
    return few and accepts_stored(q, x.dtype) and unit(q) % 32 == 0


def has_panels(dtype: torch.dtype) -> bool:
    """Does C multiply panels of this type, and torch have no tiles in hardware that are faster still?"""
    return dtype == torch.bfloat16 and multiplies_bf16() and not tiles_bf16()


def multiplies_bf16() -> bool:
    found = library()
    return found is not None and bool(found.multiplies_bf16())


@lru_cache
def tiles_bf16() -> bool:
    return bool(capabilities().get("amx_bf16"))


def unit(q: QuantizedTensor) -> int:
    """The longest run of inputs that never crosses from one block into the next, in any row."""
    return math.gcd(q.shape[1], q.config.block_size)


def accepts_dropout(x: Tensor, _: Any = None) -> bool:
    """Is x of a dtype that C drops from?"""
    return library() is not None and x.dtype in DTYPES


def dequantize(
    q: QuantizedTensor, dtype: torch.dtype | None = None, out: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """The weight that is stored: level times scale in float32, then one rounding to `dtype`."""
    check_sizes(q)
    if out is None:
        out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
        loaded().prefer_huge_pages(out.data_ptr(), out.nbytes)
    check_out(q, dtype, out)
    if not out.is_contiguous():
        return out.copy_(dequantize(q, out.dtype))
    scales = StoredScales.of(q)
    n, block_size = q.numel, clipped(q.config.block_size, q.numel)
    packed, levels = q.packed.contiguous(), tables(q.config.codebook).levels
    loaded().dequantize(
        packed.data_ptr(), scales.c, levels.data_ptr(), out.data_ptr(), n, block_size, DTYPES[out.dtype], threads()
    )
    return out


def quantize(
    weight: Shaped[Tensor, "..."], config: QuantConfig = QuantConfig(), *, name: str = "weight"
) -> QuantizedTensor:
    """Round every weight to the nearest level of its block."""
    return quantize_by(STEPS, weight, config, name)


def matmul(
    x: Float[Tensor, "M K"],
    q: QuantizedTensor,
    bias: Float[Tensor, " N"] | None = None,
    xa: Float[Tensor, "M R"] | None = None,
    lora_b: Float[Tensor, "N R"] | None = None,
    scaling: float = 1.0,
) -> Float[Tensor, "M N"]:
    """(M, K) -> (M, N): y = x W^T + bias + scaling xa B^T, where W = dequantize(q) is (N, K)."""
    (M, K), N = x.shape, q.shape[0]
    bias = None if bias is None else bias.float().contiguous()
    y = x.new_empty(M, N)
    packed, levels, scales = q.packed.contiguous(), tables(q.config.codebook).levels, StoredScales.of(q)
    weight = packed.data_ptr(), scales.c, levels.data_ptr(), pointer(bias), y.data_ptr()
    sizes = M, N, K, clipped(q.config.block_size, q.numel), unit(q)
    if M > PANELS and has_panels(x.dtype):
        tokens = apart(x)
        failed = loaded().multiply_panels(tokens.data_ptr(), tokens.stride(0), *weight, *sizes, threads())
    else:
        tokens = (x if x.dtype == torch.bfloat16 and multiplies_bf16() else x.float()).contiguous()
        failed = loaded().multiply(tokens.data_ptr(), *weight, *sizes, DTYPES[x.dtype], threads())
    check_memory(failed)
    if xa is not None and lora_b is not None:
        y.addmm_(xa.to(x.dtype), lora_b.to(x.dtype).T, alpha=scaling)
    return y


def apart(x: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
    """x with rows that do not all fall on the same places of a cache, as those of 2^n bytes do."""
    M, K = x.shape
    if x.stride(1) == 1 and x.stride(0) % 512:
        return x
    return x.new_empty(M, K + 32)[:, :K].copy_(x)


def drop(x: Float[Tensor, "..."], dropout: float, seed: int | None) -> Float[Tensor, "..."]:
    """x with a share of its entries set to zero and the others scaled up, so that the mean stays."""
    if not dropout or seed is None:
        return x
    x = x.contiguous()
    out = torch.empty_like(x)
    loaded().thin(
        x.data_ptr(), out.data_ptr(), x.numel(), seed, reference.threshold(dropout), 1 / (1 - dropout),
        DTYPES[x.dtype], threads(),
    )  # fmt: skip
    return out


def dropout_mask(shape: tuple[int, ...], dropout: float, seed: int, device: torch.device) -> Bool[Tensor, "..."]:
    """Which entries stay: the same for the same seed and shape, so that nothing need keep the mask."""
    out = torch.empty(shape, dtype=torch.bool)
    loaded().dropout_mask(out.data_ptr(), out.numel(), seed, reference.threshold(dropout), threads())
    return out


# Steps of quantizing


def block_absmax(flat: Float[Tensor, " n"], block_size: int) -> Float32[Tensor, " num_blocks"]:
    """The largest magnitude in each block, as float32; NaN where a block has one."""
    n = len(flat)
    out = torch.empty(-(-n // block_size))
    flat = flat.contiguous()
    loaded().absmax(flat.data_ptr(), out.data_ptr(), n, clipped(block_size, n), DTYPES[flat.dtype], threads())
    if n % block_size:
        out[-1].clamp_min_(1e-38)
    return out


def encode(
    flat: Float[Tensor, " n"], scales: Float32[Tensor, " num_blocks"], config: QuantConfig
) -> UInt8[Tensor, " bytes"]:
    """The packed codes of the levels nearest to each weight over its block's scale."""
    n = len(flat)
    packed = torch.empty(-(-n // 2), dtype=torch.uint8)
    flat, book = flat.contiguous(), tables(config.codebook)
    loaded().encode(
        flat.data_ptr(), scales.data_ptr(), book.c, packed.data_ptr(), n, min(config.block_size, n + 2 - n % 2),
        DTYPES[flat.dtype], zero_code(config.codebook), threads(),
    )  # fmt: skip
    return packed


def quantize_absmax(absmax: Float32[Tensor, " num_blocks"], nested_block_size: int = 256) -> Nested:
    """Codes, second-level scales and offset of a vector of scales; each code is the exact nearest entry."""
    n = len(absmax)
    offset, centred = without_mean(absmax)
    nested = torch.empty(-(-n // nested_block_size))
    codes = torch.empty(n, dtype=torch.uint8)
    middles = entry_midpoints(absmax.device)
    loaded().encode_scales(
        centred.data_ptr(), middles.data_ptr(), nested.data_ptr(), codes.data_ptr(), n,
        clipped(nested_block_size, n), threads(),
    )  # fmt: skip
    check_finite(absmax, nested)
    return codes, nested, offset


def search_scales(
    flat: Float[Tensor, " n"], absmax: Float32[Tensor, " num_blocks"], config: QuantConfig
) -> Float32[Tensor, " num_blocks"]:
    """The scale of each block with the least squared error that was found; it may be negative."""
    flat, n = flat.contiguous(), len(flat)
    table, ratios = candidate_table(config.codebook, flat.device)
    book, scales = tables(config.codebook), torch.empty_like(absmax)
    failed = loaded().search(
        flat.data_ptr(), absmax.data_ptr(), table.data_ptr(), ratios.data_ptr(), book.c, scales.data_ptr(), n,
        clipped(config.block_size, n), GRID, REFITS, torch.finfo(flat.dtype).max, DTYPES[flat.dtype], threads(),
    )  # fmt: skip
    check_memory(failed)
    return scales


def squared_errors(
    flat: Float[Tensor, " n"], scales: Float32[Tensor, " num_blocks"], config: QuantConfig
) -> Float64[Tensor, " num_blocks"]:
    """The squared error that each block of a weight has under these scales."""
    flat, n = flat.contiguous(), len(flat)
    out = torch.empty(len(scales), dtype=torch.float64)
    failed = loaded().squared_errors(
        flat.data_ptr(), scales.data_ptr(), tables(config.codebook).c, out.data_ptr(), n,
        clipped(config.block_size, n), DTYPES[flat.dtype], threads(),
    )  # fmt: skip
    check_memory(failed)
    return out


STEPS = Steps(block_absmax, search_scales, squared_errors, quantize_absmax, encode)


# What C is handed


@dataclass(frozen=True)
class Tables:
    """A codebook as C reads it: by code for decoding, ascending for encoding."""

    levels: Float32[Tensor, "16"]
    ascending: Float32[Tensor, "16"]
    midpoints: Float32[Tensor, "15"]
    order: UInt8[Tensor, "16"]

    @property
    def c(self) -> Codebook:
        return Codebook(self.ascending.data_ptr(), self.midpoints.data_ptr(), self.order.data_ptr())


@lru_cache
def tables(name: str) -> Tables:
    """The tables of a 4-bit codebook, filled up to sixteen: a code that it does not use decodes to NaN."""
    with torch.inference_mode(False), torch.device("cpu"):
        levels, codes = ascending(name)
        unused = 16 - len(levels)
        return Tables(
            torch.cat([levels_of(name), torch.full((unused,), math.nan)]),
            torch.cat([levels, levels[-1:].expand(unused)]),
            torch.cat([(levels[:-1] + levels[1:]) / 2, torch.full((unused,), math.inf)]),
            torch.cat([codes, codes.new_zeros(unused)]).to(torch.uint8),
        )


@dataclass(frozen=True)
class StoredScales:
    """A weight's scales as C reads them, with the tensors that the pointers lead to."""

    c: Scales
    kept: tuple[Tensor, ...]

    @classmethod
    def of(cls, q: QuantizedTensor) -> "StoredScales":
        if q.absmax is not None:
            absmax = q.absmax.contiguous()
            return cls(Scales(absmax.data_ptr(), None, None, None, None, 1), (absmax,))
        assert q.absmax_codes is not None
        assert q.nested_absmax is not None
        assert q.absmax_offset is not None
        kept = tuple(t.contiguous() for t in (q.absmax_codes, q.nested_absmax, map_on(q.device), q.absmax_offset))
        return cls(Scales(None, *(t.data_ptr() for t in kept), q.config.nested_block_size), kept)


def loaded() -> Any:
    """The library in C, which runs nothing while a step is only planned."""
    found = library()
    assert found is not None  # `accepts_...` has said so
    return found if stand.kind is None else Unrun(found)


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def clipped(block_size: int, n: int) -> int:
    """A block no longer than the weight, so that no product of sizes overflows."""
    return min(block_size, max(n, 1))


def threads() -> int:
    return torch.get_num_threads()


def check_memory(failed: int) -> None:
    if failed:
        raise MemoryError("a CPU operator found no memory for the scales or weights of one block")
