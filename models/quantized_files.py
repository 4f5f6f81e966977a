"""Which quantized checkpoints are not read here, and how they are recognised before a tensor is missed.

Other methods keep their weights under the same names with others beside them, so that a reader which did not look
would complain of missing or unexpected tensors. config.json names the method; where it is silent, the tensors show it.
"""

from collections.abc import Collection
from typing import Any

from models.errors import CheckpointError
from models.writer import OUR_METHOD

# The end of a tensor's name, and the method that uses it.
SIGNS = {
    ".SCB": "bitsandbytes in 8 bits",
    ".weight_format": "bitsandbytes in 8 bits",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8 or compressed-tensors",
    ".weight_packed": "compressed-tensors",
    ".W_q": "HQQ",
}
ADVICE = "load the checkpoint that it was made from, which can be quantized to 4 bits here"


def refuse_other_methods(raw: dict[str, Any], where: str, tensors: Collection[str]) -> None:
    """Raise, naming the method, unless weights are dense or in 4 bits as bitsandbytes and `models.save` store them."""
    config = raw.get("quantization_config")
    if config is not None:
        if not isinstance(config, dict):
            raise CheckpointError(f"{where}: quantization_config is {config!r:.80}; an object is expected")
        if config.get("load_in_8bit"):
            raise CheckpointError(f"{where}: its weights are in 8 bits (load_in_8bit), which is not read; {ADVICE}")
        # The first files of bitsandbytes named no method.
        method = config.get("quant_method", "bitsandbytes" if "load_in_4bit" in config else None)
        if method not in ("bitsandbytes", OUR_METHOD):
            raise CheckpointError(
                f"{where}: its weights are quantized with {method!r:.80}, which is not read; {ADVICE}"
            )
    for name in tensors:
        for sign, method in SIGNS.items():
            if name.endswith(sign):
                raise CheckpointError(f"{where}: {name} belongs to weights of {method}, which is not read; {ADVICE}")
