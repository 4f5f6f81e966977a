"""A weight in blocks: every 64 consecutive weights share one scale, and each is stored as a 4-bit code.

Blocks run along the flattened weight and cross its rows freely; the last one may be partial. In a block,

    absmax = max |w|        code = the level nearest to w / absmax        w ~ level * absmax

Codes are packed big-endian: of two 4-bit codes in a byte, the earlier weight has the high nibble. All of it
is done a chunk at a time, so that a weight of any size takes a few megabytes beside its input and its result.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from nf4.codebook import code_bits, nearest_codes, zero_code
from nf4.config import QuantConfig
from nf4.double_quant import Nested, check_nested_sizes, dequantize_absmax, quantize_absmax
from nf4.packing import pack, unpack, unpack_table
from nf4.search import search_scales, squared_errors

INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Weights handled at once. A multiple of 8, so that a chunk of codes of any width starts and ends on a byte;
# small enough for a chunk and its temporaries to stay in a cache, which is three times as fast as whole
# tensors.
CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A stored weight: codes, scales, and what it takes to give back a tensor of the same shape and dtype."""

    packed: UInt8[Tensor, " bytes"]
    """The codes, ceil(n * bits / 8) bytes, big-endian."""
    absmax: Float[Tensor, " num_blocks"] | None
    """One float32 scale per block; None with double quantization. A searched scale may be negative."""
    absmax_codes: UInt8[Tensor, " num_blocks"] | None
    """With double quantization: one index into the dynamic map per block."""
    nested_absmax: Float[Tensor, " num_nested_blocks"] | None
    """With double quantization: the float32 scales of the scales."""
    absmax_offset: Float[Tensor, ""] | None
    """With double quantization: the mean scale, which was taken out first; float32."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    config: QuantConfig

    @property
    def scales(self) -> Float[Tensor, " num_blocks"]:
        """One float32 scale per block, decoded if they are stored in 8 bits."""
        if self.absmax is not None:
            return self.absmax
        assert self.absmax_codes is not None
        assert self.nested_absmax is not None
        assert self.absmax_offset is not None
        return dequantize_absmax(
            self.absmax_codes, self.nested_absmax, self.absmax_offset, self.config.nested_block_size
        )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes stored for this weight: codes and scales (the tables are the format's, not the weight's)."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight; 0 for a weight without elements."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by field name."""
        names = ("packed", "absmax", "absmax_codes", "nested_absmax", "absmax_offset")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """The same weight on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})


def quantize(
    weight: Shaped[Tensor, "..."], config: QuantConfig = QuantConfig(), *, name: str = "weight"
) -> QuantizedTensor:
    """Round every weight to the nearest level of its block.

    A weight halfway between two levels takes the lower one, and a block of zeros the code of zero, so that it
    decodes to exactly 0 whatever becomes of its scale. `name` is what an error message calls the weight.
    """
    return quantize_by(STEPS, weight, config, name)


class Steps(NamedTuple):
    """What quantizing consists of. A device may have faster forms of them; the order they come in is one."""

    block_absmax: Callable[[Tensor, int], Tensor]
    search_scales: Callable[[Tensor, Tensor, QuantConfig], Tensor]
    squared_errors: Callable[[Tensor, Tensor, QuantConfig], Tensor]
    quantize_absmax: Callable[[Tensor, int], Nested]
    encode: Callable[[Tensor, Tensor, QuantConfig], Tensor]


@torch.no_grad()
def quantize_by(steps: Steps, weight: Shaped[Tensor, "..."], config: QuantConfig, name: str) -> QuantizedTensor:
    """`quantize`, with each step done as `steps` does it."""
    if weight.dtype not in INPUT_DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16 to be quantized, not {weight.dtype}")
    flat = weight.detach().reshape(-1)
    absmax = steps.block_absmax(flat, config.block_size)
    refuse_non_finite(flat, absmax, weight.shape, config.block_size, name)

    scales = steps.search_scales(flat, absmax, config) if config.scale == "search" else absmax
    nested = None
    if config.double_quant:
        nested = steps.quantize_absmax(scales, config.nested_block_size)  # codes go by the scales before rounding
    if nested and config.scale == "search":
        nested = better_nested(steps, flat, absmax, nested, config)
        scales = dequantize_absmax(*nested, config.nested_block_size)  # what a reader will multiply by
    return QuantizedTensor(
        packed=steps.encode(flat, scales, config),
        absmax=None if nested else scales,
        absmax_codes=nested[0] if nested else None,
        nested_absmax=nested[1] if nested else None,
        absmax_offset=nested[2] if nested else None,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        config=config,
    )


def better_nested(
    steps: Steps, flat: Float[Tensor, " n"], absmax: Float[Tensor, " num_blocks"], searched: Nested, config: QuantConfig
) -> Nested:
    """The searched scales in 8 bits, or absmax in 8 bits if that fits the weight better once decoded."""
    plain = steps.quantize_absmax(absmax, config.nested_block_size)
    searched_error, plain_error = (
        steps.squared_errors(flat, dequantize_absmax(*each, config.nested_block_size), config).sum()
        for each in (searched, plain)
    )
    return searched if searched_error < plain_error else plain


@torch.no_grad()
def dequantize(
    q: QuantizedTensor, dtype: torch.dtype | None = None, out: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """The weight that is stored: level times scale in float32, then one rounding to `dtype`.

    `out` is where to put it, a tensor of q's shape and of `dtype`; without it memory is made.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    check_out(q, dtype, out)
    if not out.is_contiguous():
        return out.copy_(dequantize(q, out.dtype))
    flat = out.view(-1)
    for start, values in decode(q):
        flat[start : start + len(values)].copy_(values)
    return out


def block_absmax(flat: Float[Tensor, " n"], block_size: int) -> Float[Tensor, " num_blocks"]:
    """The largest magnitude in each block, as float32; NaN where a block has one.

    A partial last block of zeros has 1e-38, as bitsandbytes writes it; any other block of zeros has 0.
    """
    whole = len(flat) // block_size * block_size
    blocks = [flat[:whole].view(-1, block_size), flat[whole:].view(-1, max(len(flat) - whole, 1))]
    extremes = [part.aminmax(dim=1) for part in blocks if part.numel()]  # unlike abs().amax(), copies nothing
    absmax = [torch.maximum(low.abs(), high.abs()).float() for low, high in extremes]
    if whole < len(flat):
        absmax[-1] = absmax[-1].clamp_min(1e-38)
    return torch.cat(absmax) if absmax else torch.empty(0, device=flat.device)


def refuse_non_finite(flat: Tensor, absmax: Tensor, shape: torch.Size, block_size: int, name: str) -> None:
    """Say which weight is NaN or infinite: one of them would spoil its whole block, unseen."""
    bad_blocks = ~absmax.isfinite()
    if not bad_blocks.any():
        return
    block = int(bad_blocks.int().argmax())
    inside = flat[block * block_size : (block + 1) * block_size]
    offset = int((~inside.isfinite()).int().argmax())
    position, index = block * block_size + offset, []
    for size in reversed(shape):
        position, last = divmod(position, size)
        index.append(last)
    value = float(inside[offset])
    raise ValueError(
        f"{name} is {value} at index {tuple(reversed(index))}, and only finite weights can be quantized; "
        "the file it came from is damaged or its training diverged"
    )


def encode(
    flat: Float[Tensor, " n"], scales: Float[Tensor, " num_blocks"], config: QuantConfig
) -> UInt8[Tensor, " bytes"]:
    """The packed codes of the levels nearest to each weight over its block's scale."""
    n, bits = len(flat), code_bits(config.codebook)
    packed = torch.empty(-(-n * bits // 8), dtype=torch.uint8, device=flat.device)
    # 1e-38 keeps a block of zeros zero, and the reciprocal of every other scale finite.
    safe = torch.copysign(scales.abs().clamp_min(1e-38), scales)
    reciprocals = 1 / safe
    for start in range(0, n, CHUNK):
        values = normalized(flat, safe, reciprocals, start, config.block_size)
        codes = nearest_codes(values, config.codebook)
        at = start * bits // 8
        part = pack(codes, bits, zero_code(config.codebook))
        packed[at : at + len(part)] = part
    return packed


def decode(q: QuantizedTensor) -> Iterator[tuple[int, Float[Tensor, " chunk"]]]:
    """The weight in float32, a chunk at a time, each with the position where it starts."""
    check_sizes(q)
    bits, scales, block_size = code_bits(q.config.codebook), q.scales, q.config.block_size
    table = unpack_table(q.config.codebook, q.device)
    for start in range(0, q.numel, CHUNK):
        stop = min(start + CHUNK, q.numel)
        values = unpack(q.packed[start * bits // 8 : -(-stop * bits // 8)], table, bits)[: stop - start]
        multiply_blocks(values, scales, start, block_size)
        yield start, values


def check_sizes(q: QuantizedTensor) -> None:
    """Refuse codes or scales that are too few or too many for the shape: a kernel would read past them."""
    n, bits, block_size = q.numel, code_bits(q.config.codebook), q.config.block_size
    scales = q.absmax if q.absmax_codes is None else q.absmax_codes
    count = 0 if scales is None else len(scales)
    if q.packed.numel() != -(-n * bits // 8) or count != -(-n // block_size):
        raise ValueError(
            f"a weight of shape {q.shape} has {-(-n * bits // 8)} bytes of {bits}-bit codes and "
            f"{-(-n // block_size)} scales, but {q.packed.numel()} bytes and {count} scales came"
        )
    if q.absmax_codes is not None and q.nested_absmax is not None:
        check_nested_sizes(q.absmax_codes, q.nested_absmax, q.config.nested_block_size)


def check_out(q: QuantizedTensor, dtype: torch.dtype | None, out: Tensor) -> None:
    if tuple(out.shape) != q.shape or out.dtype != (dtype or out.dtype) or out.device != q.device:
        raise ValueError(
            f"out must be {dtype or out.dtype} of shape {q.shape} on {q.device}, "
            f"not {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )


def normalized(
    flat: Float[Tensor, " n"],
    scales: Float[Tensor, " num_blocks"],
    reciprocals: Float[Tensor, " num_blocks"],
    start: int,
    block_size: int,
) -> Float[Tensor, " chunk"]:
    """A chunk of weights over their scales, in [-1, 1].

    Whole blocks are multiplied by the reciprocal and a partial last block is divided, as the stored format
    does: the two differ in the last bit, and now and then in a code.
    """
    chunk = flat[start : start + CHUNK]
    values = chunk.to(torch.float32, copy=True)
    multiply_blocks(values, reciprocals, start, block_size)
    partial = max(len(flat) // block_size * block_size - start, 0)
    if partial < len(chunk):
        values[partial:] = chunk[partial:].float() / scales[-1]
    return values.clamp_(-1, 1)


def multiply_blocks(
    values: Float[Tensor, " chunk"], scales: Float[Tensor, " num_blocks"], start: int, block_size: int
) -> None:
    """Multiply, in place, every value of a chunk that starts at `start` by its block's scale."""
    stop = start + len(values)
    head = min(-(-start // block_size) * block_size, stop)  # whole blocks run from head to tail
    tail = max(stop // block_size * block_size, head)
    for first, last in ((start, head), (tail, stop)):
        if first < last:
            values[first - start : last - start] *= scales[first // block_size]
    whole = values[head - start : tail - start].view(-1, block_size)
    whole *= scales[head // block_size : tail // block_size, None]


STEPS = Steps(block_absmax, search_scales, squared_errors, quantize_absmax, encode)
