"""Double quantization: the scales are themselves stored in 8 bits.

A float32 scale for every 64 weights costs half a bit per weight. The scales of a weight are alike, so their
mean is taken out and what remains is stored as 8-bit codes of the dynamic map, with one float32 scale per 256 of
them: 8/64 + 32/(64 * 256), 0.127 bits per weight.
"""

from jaxtyping import Float, UInt8
from torch import Tensor

from nf4.dynamic import dequantize_dynamic, quantize_dynamic

Nested = tuple[UInt8[Tensor, " num_blocks"], Float[Tensor, " num_nested_blocks"], Float[Tensor, ""]]


def quantize_absmax(absmax: Float[Tensor, " num_blocks"], nested_block_size: int = 256) -> Nested:
    """Codes, second-level scales and offset of a vector of scales; each code is the exact nearest entry."""
    offset, centred = without_mean(absmax)
    codes, nested_absmax = quantize_dynamic(centred, nested_block_size)
    check_finite(absmax, nested_absmax)
    return codes, nested_absmax, offset


def without_mean(absmax: Float[Tensor, " num_blocks"]) -> tuple[Float[Tensor, ""], Float[Tensor, " num_blocks"]]:
    """The mean scale, in float32 as bitsandbytes takes it, and what it leaves of each scale."""
    offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
    return offset, absmax - offset


def check_finite(absmax: Float[Tensor, " num_blocks"], nested_absmax: Float[Tensor, " num_nested_blocks"]) -> None:
    if not nested_absmax.isfinite().all():
        raise ValueError(
            f"double quantization takes the mean of the scales in float32, and scales up to "
            f"{float(absmax.abs().max()):.3g} overflow it: store this weight with double_quant=False"
        )


def check_nested_sizes(
    codes: UInt8[Tensor, " num_blocks"], nested_absmax: Float[Tensor, " num_nested_blocks"], nested_block_size: int
) -> None:
    expected = -(-len(codes) // nested_block_size)
    if len(nested_absmax) != expected:
        raise ValueError(
            f"{len(codes)} scales in blocks of {nested_block_size} have {expected} second-level scales, "
            f"but {len(nested_absmax)} came"
        )


def dequantize_absmax(
    codes: UInt8[Tensor, " num_blocks"],
    nested_absmax: Float[Tensor, " num_nested_blocks"],
    offset: Float[Tensor, ""],
    nested_block_size: int = 256,
) -> Float[Tensor, " num_blocks"]:
    """The float32 scales that are stored: entry times second-level scale, then plus offset, each rounded."""
    check_nested_sizes(codes, nested_absmax, nested_block_size)
    return dequantize_dynamic(codes, nested_absmax, nested_block_size) + offset
