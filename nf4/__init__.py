"""What a stored weight means: codebooks, blocks, double quantization, storage, error."""

from nf4.blockwise import QuantizedTensor, dequantize, quantize
from nf4.codebook import CODEBOOKS, codebook
from nf4.config import QuantConfig
from nf4.double_quant import dequantize_absmax, dynamic_map, quantize_absmax

__all__ = [
    "CODEBOOKS",
    "QuantConfig",
    "QuantizedTensor",
    "codebook",
    "dequantize",
    "dequantize_absmax",
    "dynamic_map",
    "quantize",
    "quantize_absmax",
]
