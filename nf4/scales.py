"""The scales of a weight while they are being chosen: each is at once what a reader will decode.

With double quantization a scale is stored as one of 256 entries, so the value that was wished for is not the one that
weights will be multiplied by. Codes chosen by the wish would be wrong ones. The second level (the mean, and one
float32 for 256 scales) needs all scales and they are chosen one after the other; so it is taken from a first guess of
all of them and then kept, and every scale put here afterwards becomes the nearest that this second level can say.
"""

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from nf4.config import QuantConfig
from nf4.double_quant import Nested, dequantize_absmax, quantize_absmax
from nf4.dynamic import entry_midpoints, map_on


class ChosenScales:
    """One scale per block, to be read as decoded and put as wished."""

    def __init__(self, guess: Float32[Tensor, " num_blocks"], config: QuantConfig) -> None:
        self.decoded = guess.clone()
        """What a reader multiplies by."""
        self.nested: Nested | None = None
        """With double quantization: codes, second-level scales and the offset."""
        self.nested_block_size = config.nested_block_size
        if config.double_quant:
            self.nested = quantize_absmax(guess, config.nested_block_size)
            self.decoded = dequantize_absmax(*self.nested, config.nested_block_size)

    def put(self, blocks: Int64[Tensor, " some"], wished: Float32[Tensor, " some"]) -> Float32[Tensor, " some"]:
        """Give these blocks the scales nearest to those wished for, and say which they are."""
        if self.nested is not None:
            codes, nested_absmax, offset = self.nested
            unit = nested_absmax[blocks // self.nested_block_size]
            ratio = (wished - offset).double() / unit.double().clamp_min(1e-300)
            nearest = torch.bucketize(ratio, entry_midpoints(wished.device))
            codes[blocks] = nearest.to(torch.uint8)
            wished = map_on(wished.device)[nearest] * unit + offset
        self.decoded[blocks] = wished
        return wished
