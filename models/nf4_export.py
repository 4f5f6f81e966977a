"""A 4-bit checkpoint for bitsandbytes: codes and scales under its keys, and a config.json that names them.

Only what other readers know is written: nf4 or fp4 in their block sizes, and dense those layers that they never
take in 4 bits. An adapter stays apart, because it was trained around these very codes; merged and quantized again
it loses part of what it learned, and the result says how much.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kernels
import nf4
from models.checkpoint import open_checkpoint, skeleton, stored_in_4_bits, stream
from models.device import DTYPES, pick_device, pick_dtype
from models.errors import ConfigError
from models.linear import AdaptableLinear, Linear, NF4Linear
from models.methods import merge_adapter, merged, merged_bias, refuse_unmergeable
from models.model import Model
from models.quantize import LayerReport, quantize_checkpoint, readable, report
from models.target import LoadOptions, Target, load_parts
from models.tokenizer import find_tokenizer, save_tokenizer
from models.writer import save, unknown_to_others
from nf4 import QuantConfig, QuantizedTensor


def export_nf4(target: Target, out: Path, options: LoadOptions, merge: bool = False) -> dict[str, Any]:
    """Write the base, or with `merge` base and adapter together, and read every tensor back."""
    raw, reader, _ = open_checkpoint(target.base)
    stored = bool(stored_in_4_bits(reader))
    quant = None if stored else target.quant or options.quant
    problem = quant and unknown_to_others(quant)
    if problem:
        raise ConfigError(f"export: {problem}. `qlora quantize` writes any format, for this project to read")
    device = pick_device(options.device)
    dtype = pick_dtype(stored_dtype(options.dtype, target.dtype, raw if stored else {}), device)
    partial = out.with_name(f".{out.name}.export-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if merge:
            layers, notes = export_merged(target, partial, options, quant, dtype, device)
        else:
            layers, notes = quantize_checkpoint(target.base, partial, quant, dtype, device, for_others=True), []
        count = read_back(partial, dtype)
        if out.exists():
            out.rmdir()  # empty: the command refuses any other
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if target.adapter is not None and not merge:
        hint = f"`qlora export RUN DIRECTORY --format adapter --base {out}` writes it for this base"
        notes.append(f"the adapter is not in it: {hint}")
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    notes.append(f"{count} layers in 4 bits; {size / 1e6:.1f} MB in {out}")
    worst = max((layer.relative_error for layer in layers), default=None)
    return {"layers": count, "bytes": size, "worst_relative_error": worst, "notes": notes}


def stored_dtype(asked: str, of_run: str | None, raw: dict[str, Any]) -> str:
    """What everything but the codes is written in: as asked, as the run computed, or as the file says."""
    if asked != "auto":
        return asked
    if of_run is not None:
        return of_run
    of_file = raw.get("torch_dtype", raw.get("dtype"))
    return of_file if isinstance(of_file, str) and of_file in DTYPES else "bfloat16"


def export_merged(
    target: Target,
    out: Path,
    options: LoadOptions,
    quant: QuantConfig | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[list[LayerReport], list[str]]:
    """The checkpoint of base and adapter together, each layer merged in float32 and quantized again."""
    if target.adapter is None:
        raise ConfigError("export: --merge needs an adapter; name a run, or give --load.adapter DIRECTORY")
    tokenizer = find_tokenizer(target.base)
    model = load_parts(target, options, dtype, device)
    refuse_unmergeable(model)
    layers, ratios = [], []
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, AdaptableLinear)]:
        ratio = requantize(model, name, layer, quant, dtype, layers)
        ratios += [] if ratio is None else [ratio]
    merge_adapter(model)  # what is left: modules that were trained whole
    save(model, out)
    if tokenizer is not None:
        save_tokenizer(tokenizer, out)
    return layers, [
        f"merged and quantized again: rounding moves the weights {sum(ratios) / max(len(ratios), 1):.2f} times as far "
        "as the adapter did; base and adapter apart keep all that was learned"
    ]


@torch.no_grad()
def requantize(
    model: Model,
    name: str,
    layer: AdaptableLinear,
    quant: QuantConfig | None,
    dtype: torch.dtype,
    layers: list[LayerReport],
) -> float | None:
    """Put the merged layer in place; the size of its rounding error in those of the adapter's change comes back."""
    config = layer.quant_config if isinstance(layer, NF4Linear) else None if layer.in_head else quant
    base = layer.dense_weight().float()
    weight = merged(base, layer)
    bias = None if layer.bias is None else nn.Parameter(merged_bias(layer.bias.detach(), layer))
    if config is None:  # a head, or a layer that is dense among others in 4 bits, stays so
        model.set_submodule(name, Linear.from_weight(weight.to(dtype), bias, layer.in_head))
        return None
    if isinstance(layer, NF4Linear) and not layer.adapted:
        q = layer.quantized
    else:
        q = replace(kernels.quantize(weight, config, name=f"{name}.weight"), dtype=dtype)
    value = readable(f"{name}.weight", q, weight, model)
    if not isinstance(value, QuantizedTensor):
        model.set_submodule(name, Linear.from_weight(value, bias, layer.in_head))
        return None
    layers.append(report(f"{name}.weight", weight, value))
    model.set_submodule(name, NF4Linear(value, bias, layer.in_head))
    change = (weight - base).norm().item()
    return (nf4.dequantize(value, torch.float32) - weight).norm().item() / change if change else None


def read_back(out: Path, dtype: torch.dtype) -> int:
    """How many layers the written checkpoint holds in 4 bits; whatever our own reader refuses is refused."""
    raw, reader, where = open_checkpoint(out)
    model = skeleton(raw, where, reader)
    values = stream(model, reader, None, dtype, torch.device("cpu"))
    return sum(isinstance(value, QuantizedTensor) for _, value, _ in values)
