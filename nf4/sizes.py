"""A stored weight before there is one: its tensors follow from its shape and its format."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nf4.blockwise import QuantizedTensor
from nf4.codebook import code_bits
from nf4.config import QuantConfig


def without_memory(shape: Sequence[int], dtype: torch.dtype, config: QuantConfig) -> QuantizedTensor:
    """A weight of this shape and format, decoding to `dtype`, whose tensors are on "meta"."""
    n = math.prod(shape)
    blocks = -(-n // config.block_size)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    packed = empty(-(-n * code_bits(config.codebook) // 8), dtype=torch.uint8)
    if not config.double_quant:
        return QuantizedTensor(packed, empty(blocks), None, None, None, tuple(shape), dtype, config)
    codes, nested = empty(blocks, dtype=torch.uint8), empty(-(-blocks // config.nested_block_size))
    return QuantizedTensor(packed, None, codes, nested, empty(), tuple(shape), dtype, config)
