"""A run's adapter as a directory that PEFT loads: its tensors unchanged, with the base's name and tokenizer.

The base is not read, only its shapes: an adapter of another model is refused, and so is one that never learned
(every B zero) or that holds NaN.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import open_checkpoint, skeleton
from models.errors import CheckpointError, ConfigError
from models.linear import AdaptableLinear
from models.readers import SafetensorsReader, read_json
from models.target import Target
from models.tokenizer import load_tokenizer, save_tokenizer

FILES = ("adapter_model.safetensors", "adapter_config.json")
PREFIX = "base_model.model."


def export_adapter(target: Target, out: Path, base_name: str | None = None) -> dict[str, Any]:
    """Write the directory `out`, aside first, and compare what it holds."""
    if target.adapter is None:
        raise ConfigError("export: this checkpoint has no adapter; name a run, or give --load.adapter DIRECTORY")
    config = read_json(target.adapter / FILES[1])
    reader = SafetensorsReader(target.adapter / FILES[0])
    raw, base, where = open_checkpoint(target.base)
    learned = check_fit(reader, dict(skeleton(raw, where, base).named_modules()))
    tokenizer = load_tokenizer(target.base)

    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        shutil.copyfile(reader.path, partial / FILES[0])
        config["base_model_name_or_path"] = base_name or str(target.base)
        (partial / FILES[1]).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_tokenizer(tokenizer, partial)
        verify(partial, reader, config)
        if out.exists():
            out.rmdir()  # empty: the command refuses any other
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    notes = [f"{len(reader.shapes)} tensors in {out}, for the base {config['base_model_name_or_path']}"]
    return {"tensors": len(reader.shapes), "learned": learned, "notes": notes}


def check_fit(reader: SafetensorsReader, modules: dict[str, Any]) -> int:
    """How many layers learned something; an adapter for another model, or without numbers, is refused."""
    learned = 0
    for name in reader.shapes:
        layer, _, part = name.removeprefix(PREFIX).partition(".lora_")
        tensor = finite(reader, name)
        if not part:
            continue
        module = modules.get(layer)
        if not isinstance(module, AdaptableLinear):
            raise CheckpointError(f"{reader.path}: {name} is for {layer}, which the base has no linear layer for")
        expected = {"A": module.in_features, "B": module.out_features}.get(part[:1])
        found = reader.shapes[name][1 if part[:1] == "A" else 0]
        if expected is not None and found != expected:
            raise CheckpointError(f"{reader.path}: {name} fits {found} features, but {layer} has {expected}")
        learned += part[:1] == "B" and bool(tensor.any())
    if not learned:
        raise CheckpointError(f"{reader.path}: every B is zero, so the adapter does nothing; was it trained?")
    return learned


def finite(reader: SafetensorsReader, name: str) -> Tensor:
    tensor = reader.read(name)
    if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{reader.path}: {name} holds NaN, infinity or no floating-point numbers")
    return tensor


def verify(directory: Path, source: SafetensorsReader, config: dict[str, Any]) -> None:
    """Raise unless the files hold what they should: a full disk or a broken one shows here."""
    copy = SafetensorsReader(directory / FILES[0])
    same = copy.shapes == source.shapes and all(torch.equal(copy.read(n), source.read(n)) for n in source.shapes)
    if not same or read_json(directory / FILES[1]) != config:
        raise RuntimeError(f"{directory}: differs after writing; the disk may be failing")
