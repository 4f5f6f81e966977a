"""A raw checkpoint becomes NF4 safetensors, one tensor at a time, or with calibration one block at a time.

The result loads in seconds and without the original, here and wherever bitsandbytes' 4-bit checkpoints are
read. The report says what each layer lost: nothing about a model's quality can be read off it directly, but a
layer far worse than its neighbours is worth a look.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import nf4
from models.calibrate import Calibrated, Calibration, calibrated
from models.checkpoint import Values, open_checkpoint, skeleton
from models.errors import CheckpointError, ConfigError
from models.model import Model
from models.tokenizer import find_tokenizer, save_tokenizer
from models.writer import CheckpointWriter, leaf, quantization_config, unknown_to_others
from nf4 import QuantConfig, QuantizedTensor


@dataclass(frozen=True)
class LayerReport:
    """What quantizing one layer cost."""

    name: str
    shape: tuple[int, ...]
    bits_per_weight: float
    relative_error: float
    snr_db: float
    max_error: float
    output_error: float | None = None
    """With calibration: how far the layer's outputs are from those in the dense model, as a share of their norm."""


def quantize_checkpoint(
    src: str | Path,
    out: str | Path,
    quant: QuantConfig | None = QuantConfig(),
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = torch.device("cpu"),
    for_others: bool = False,
    calibration: Calibration | None = None,
) -> list[LayerReport]:
    """Write `out` from `src`; a failure on the way leaves nothing behind.

    Without `quant` the source must be in 4 bits already, and keeps its codes. `for_others` keeps those layers dense
    that no other reader takes in 4 bits, and refuses formats that only we know. With `calibration`, codes are chosen
    for what layers compute on its text.
    """
    raw, reader, where = open_checkpoint(src)
    model = skeleton(raw, where, reader)
    tokenizer = find_tokenizer(src)
    layers, quantized = [], {}
    with CheckpointWriter(out) as writer:
        values = Values(model, reader, quant, dtype)
        parts = plain(values, device) if calibration is None else calibrated(model, values, calibration, device)
        for name, value, weight, output_error in parts:
            stored: Tensor | QuantizedTensor = value
            if isinstance(value, QuantizedTensor) and for_others:
                stored = readable(name, value, weight, model)
            writer.add(name, stored)
            if isinstance(stored, QuantizedTensor):
                quantized[name] = stored.config
                if weight is not None:
                    layers.append(report(name, weight, stored, output_error))
        if not quantized:
            raise CheckpointError(f"{where}: none of its layers could be quantized")
        config = next(iter(quantized.values()))
        writer.finish(model.config.to_dict(), str(dtype), quantization_config(model, quantized, config, dtype))
    if tokenizer is not None:
        save_tokenizer(tokenizer, out)
    return layers


def plain(values: Values, device: torch.device) -> Iterator[Calibrated]:
    """Every parameter, each quantized for itself."""
    for name in values.shapes:
        yield Calibrated(name, *values.make(name, device))


def readable(name: str, q: QuantizedTensor, weight: Tensor | None, model: Model) -> Tensor | QuantizedTensor:
    """The weight as every reader of 4-bit files takes it: in 4 bits, or dense where its layer has to be."""
    if leaf(name.removesuffix(".weight")) in model.always_dense:
        return nf4.dequantize(q) if weight is None else weight.to(q.dtype)
    problem = unknown_to_others(q.config)
    if problem:
        raise ConfigError(f"{name}: {problem}. `qlora quantize` writes any format, for this project to read")
    return q


def report(name: str, weight: Tensor, q: QuantizedTensor, output_error: float | None = None) -> LayerReport:
    loss = nf4.error(weight, q)
    return LayerReport(name, q.shape, q.bits_per_weight, loss.relative, loss.snr_db, loss.max, output_error)
