"""The kinds of fine-tuning that are compared, as the settings in which they differ."""

from collections.abc import Mapping
from typing import Any, Literal

FULL, LORA, QLORA = "full 16-bit", "LoRA 16-bit", "QLoRA NF4+DQ"


def few_bits(codebook: str, double_quant: bool = False) -> dict[str, Any]:
    return {"quantize": True, "quant.codebook": codebook, "quant.double_quant": double_quant}


KINDS: Mapping[str, Mapping[str, Any]] = {
    FULL: {"adapters": False, "quantize": False},
    LORA: {"quantize": False},
    QLORA: few_bits("nf4", True),
    "QLoRA NF4": few_bits("nf4"),
    "QLoRA FP4 (E2M1)": few_bits("fp4-e2m1"),
    "QLoRA FP4 (bitsandbytes)": few_bits("fp4"),
    "QLoRA Int4": few_bits("int4"),
    "QLoRA Int8": few_bits("int8"),
}
UNTRAINED = "full 16-bit, from random weights"


def settings(kind: str) -> Mapping[str, Any]:
    return KINDS[FULL if kind == UNTRAINED else kind]


def grid(kind: str) -> Literal["full", "adapters"]:
    """Which learning rates a kind tries."""
    return "full" if kind in (FULL, UNTRAINED) else "adapters"
