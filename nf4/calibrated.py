"""Codes and scales chosen for what the layer computes, in the unchanged format.

Any reader multiplies a level by a scale, so both may be chosen as cleverly as we like. Two ways know the inputs:

- `weighted`: the signed search of `nf4.search` with the mean square of its input as every weight's importance;
- `feedback`: that search and error feedback together (`nf4.feedback`).

With double quantization both choose codes for the scales as they will be decoded.
"""

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nf4.blockwise import INPUT_DTYPES, QuantizedTensor, block_absmax, encode, refuse_non_finite
from nf4.codebook import ascending, code_bits, zero_code
from nf4.config import QuantConfig
from nf4.feedback import with_feedback
from nf4.inputs import Inputs, Residuals
from nf4.packing import pack
from nf4.scales import ChosenScales
from nf4.search import search_scales

Method = Literal["feedback", "weighted"]


@torch.no_grad()
def quantize_calibrated(
    weight: Float[Tensor, "N K"],
    inputs: Inputs,
    config: QuantConfig = QuantConfig(),
    method: Method = "feedback",
    residuals: Residuals | None = None,
    *,
    name: str = "weight",
) -> QuantizedTensor:
    """Store a layer's weight so that its outputs change little over these inputs.

    Scales are absmax or searched for, as `config.scale` says; `weighted` differs from `quantize` only if they are
    searched for. With `residuals` the outputs are brought close to other ones: those less what the weight gives for
    these inputs. `name` is what an error message calls the weight.
    """
    if weight.dtype not in INPUT_DTYPES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16 to be quantized, not {weight.dtype}")
    N, K = weight.shape
    if inputs.moment.shape != (K, K):
        raise ValueError(f"{name} takes {K} inputs, but the second moments of {len(inputs.moment)} came")
    flat = weight.detach().reshape(-1)
    refuse_non_finite(flat, block_absmax(flat, config.block_size), weight.shape, config.block_size, name)

    wanted = weight.detach().float()
    if residuals is not None:
        wanted = residuals.fitted(wanted, inputs)
    flat = wanted.reshape(-1)
    guess = block_absmax(flat, config.block_size)
    if config.scale == "search":
        guess = search_scales(flat, guess, config, inputs.importance.repeat(N))
    scales = ChosenScales(guess, config)
    if method == "weighted":
        packed = encode(flat, scales.decoded, config)
    else:
        found = with_feedback(wanted, inputs.factor, scales, config)
        packed = packed_levels(found.view(-1), config.codebook)
    return QuantizedTensor(
        packed=packed,
        absmax=None if scales.nested else scales.decoded,
        absmax_codes=scales.nested[0] if scales.nested else None,
        nested_absmax=scales.nested[1] if scales.nested else None,
        absmax_offset=scales.nested[2] if scales.nested else None,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        config=config,
    )


def packed_levels(index: UInt8[Tensor, " n"], name: str) -> UInt8[Tensor, " bytes"]:
    """Packed codes of levels that are counted from the lowest."""
    _, codes = ascending(name)
    return pack(codes.to(index.device, torch.uint8)[index.int()], code_bits(name), zero_code(name))
