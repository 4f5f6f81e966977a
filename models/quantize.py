"""`qlora quantize SRC OUT`: a raw checkpoint becomes NF4 safetensors, one tensor at a time.

The result loads in seconds and without the original, here and wherever bitsandbytes' 4-bit checkpoints are
read. The table says what each layer lost: nothing about a model's quality can be read off it directly, but a
layer far worse than its neighbours is worth a look.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tyro.conf import Positional

import nf4
from models.checkpoint import open_checkpoint, skeleton, stream
from models.device import pick_device, pick_dtype
from models.errors import CheckpointError, ConfigError
from models.model import Model
from models.precision import statement_on_disk
from models.tokenizer import find_tokenizer, save_tokenizer
from models.writer import CheckpointWriter, leaf, quantization_config, unknown_to_others
from nf4 import QuantConfig, QuantizedTensor

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class LayerReport:
    """What quantizing one layer cost."""

    name: str
    shape: tuple[int, ...]
    bits_per_weight: float
    relative_error: float
    snr_db: float
    max_error: float


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Stream a raw checkpoint into 4-bit safetensors."""

    src: Positional[str]
    """Directory or file of the checkpoint: safetensors, .bin, Meta's .pth, fairseq's .pt or GGUF."""
    out: Positional[str]
    """Directory to write; one that holds a checkpoint already is refused."""
    quant: QuantConfig = QuantConfig()
    """The format."""
    dtype: str = "bfloat16"
    """What everything else is stored in, and what the codes decode to."""
    device: str = "auto"
    """Where to quantize."""
    json: bool = False
    """Print one JSON object on stdout."""


def command(options: QuantizeOptions, console: "Console") -> dict[str, Any]:
    from rich.table import Table

    if (Path(options.out) / "config.json").exists():
        raise ConfigError(f"{options.out}: already holds a checkpoint; name another directory")
    device = pick_device(options.device)
    layers = quantize_checkpoint(options.src, options.out, options.quant, pick_dtype(options.dtype, device), device)
    table = Table(title=f"{options.src} → {options.out}")
    for column in ("layer", "shape", "bits/weight", "relative error", "SNR, dB", "max error"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer in layers:
        table.add_row(
            layer.name,
            "×".join(map(str, layer.shape)),
            f"{layer.bits_per_weight:.3f}",
            f"{layer.relative_error:.4f}",
            f"{layer.snr_db:.2f}",
            f"{layer.max_error:.4f}",
        )
    console.print(table)
    size = sum(f.stat().st_size for f in Path(options.out).glob("*.safetensors"))
    console.print(f"{len(layers)} layers in 4 bits; {size / 1e6:.1f} MB in {options.out}")
    console.print(statement_on_disk(options.out))
    return {"out": options.out, "bytes": size, "layers": [asdict(layer) for layer in layers]}


def quantize_checkpoint(
    src: str | Path,
    out: str | Path,
    quant: QuantConfig | None = QuantConfig(),
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = torch.device("cpu"),
    for_others: bool = False,
) -> list[LayerReport]:
    """Write `out` from `src`; a failure on the way leaves nothing behind.

    Without `quant` the source must be in 4 bits already, and keeps its codes. `for_others` keeps those layers dense
    that no other reader takes in 4 bits, and refuses formats that only we know.
    """
    raw, reader, where = open_checkpoint(src)
    model = skeleton(raw, where, reader)
    tokenizer = find_tokenizer(src)
    layers, quantized = [], {}
    with CheckpointWriter(out) as writer:
        for name, value, weight in stream(model, reader, quant, dtype, device):
            stored: Tensor | QuantizedTensor = value
            if isinstance(value, QuantizedTensor) and for_others:
                stored = readable(name, value, weight, model)
            writer.add(name, stored)
            if isinstance(stored, QuantizedTensor):
                quantized[name] = stored.config
                if weight is not None:
                    layers.append(report(name, weight, stored))
        if not quantized:
            raise CheckpointError(f"{where}: none of its layers could be quantized")
        config = next(iter(quantized.values()))
        writer.finish(model.config.to_dict(), str(dtype), quantization_config(model, quantized, config, dtype))
    if tokenizer is not None:
        save_tokenizer(tokenizer, out)
    return layers


def readable(name: str, q: QuantizedTensor, weight: Tensor | None, model: Model) -> Tensor | QuantizedTensor:
    """The weight as every reader of 4-bit files takes it: in 4 bits, or dense where its layer has to be."""
    if leaf(name.removesuffix(".weight")) in model.always_dense:
        return nf4.dequantize(q) if weight is None else weight.to(q.dtype)
    problem = unknown_to_others(q.config)
    if problem:
        raise ConfigError(f"{name}: {problem}. `qlora quantize` writes any format, for this project to read")
    return q


def report(name: str, weight: Tensor, q: QuantizedTensor) -> LayerReport:
    loss = nf4.error(weight, q)
    return LayerReport(name, q.shape, q.bits_per_weight, loss.relative, loss.snr_db, loss.max)
