"""What a stored weight means: codebooks, blocks, double quantization, storage, error."""

from nf4.blockwise import QuantizedTensor, dequantize, quantize
from nf4.codebook import CODEBOOKS, code_bits, codebook
from nf4.config import QuantConfig
from nf4.double_quant import dequantize_absmax, quantize_absmax
from nf4.dynamic import dequantize_dynamic, dynamic_map, quantize_dynamic
from nf4.error import WeightError, error
from nf4.storage import from_state_dict, to_state_dict

__all__ = [
    "CODEBOOKS",
    "QuantConfig",
    "QuantizedTensor",
    "WeightError",
    "code_bits",
    "codebook",
    "dequantize",
    "dequantize_absmax",
    "dequantize_dynamic",
    "dynamic_map",
    "error",
    "from_state_dict",
    "quantize",
    "quantize_absmax",
    "quantize_dynamic",
    "to_state_dict",
]
