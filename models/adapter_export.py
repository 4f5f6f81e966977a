"""A run's adapter as a directory that PEFT loads: its tensors unchanged, with the base's name and tokenizer.

The base is not read, only its shapes: an adapter of another model is refused, and so is one that holds NaN or never
learned.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from models.adapter import check, read_peft, verify
from models.bitfit import BitfitConfig
from models.checkpoint import open_checkpoint, skeleton
from models.errors import CheckpointError, ConfigError
from models.peft_names import file_name
from models.readers import read_json
from models.target import LoadOptions, Target
from models.tokenizer import find_tokenizer, save_tokenizer


def export_adapter(target: Target, out: Path, options: LoadOptions, base_name: str | None = None) -> dict[str, Any]:
    """Write the directory `out`, aside first, and compare what it holds."""
    if target.adapter is None and target.run is not None:
        raise ConfigError(
            f"export: {target.run} trained every weight, so it has no adapter; its model is {target.base}"
        )
    if target.adapter is None:
        raise ConfigError("export: this checkpoint has no adapter; name a run, or give --load.adapter DIRECTORY")
    raw, base, where = open_checkpoint(target.base)
    head, count = options.head or target.head, options.num_labels or len(target.labels) or None
    model = skeleton(raw, where, base, head, count)
    reader, settings = read_peft(target.adapter, model)
    check(model, settings, reader, target.adapter)
    if isinstance(settings, BitfitConfig):
        raise ConfigError("export: PEFT has no adapter of biases alone; `qlora merge` makes a checkpoint that has them")
    tensors = {file_name(name): reader.read(name).contiguous() for name in reader.shapes}
    learned = sum(has_learned(name, tensor) for name, tensor in tensors.items())
    if not learned:
        raise CheckpointError(
            f"{target.adapter}: every B is zero (or every vector ones), so the adapter does nothing; was it trained?"
        )
    config = read_json(target.adapter / "adapter_config.json")
    config["base_model_name_or_path"] = base_name or str(target.base)
    tokenizer = find_tokenizer(target.base)

    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial, tensors, config)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)
        if out.exists():
            out.rmdir()  # empty: the command refuses any other
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    notes = [f"{len(tensors)} tensors in {out}, for the base {config['base_model_name_or_path']}"]
    return {"tensors": len(tensors), "learned": learned, "notes": notes}


def has_learned(name: str, tensor: torch.Tensor) -> bool:
    """Is it a tensor that makes the model another one, no longer what it starts as?"""
    if name.endswith(".ia3_l"):
        return bool((tensor != 1).any())
    return name.endswith((".lora_B.weight", "prompt_embeddings")) and bool(tensor.any())


def write(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """The adapter's two files, read back."""
    settings, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, weights, {"format": "pt"})
    shutil.copymode(settings, weights)  # safetensors makes files that only their owner reads
    verify(weights, tensors)
    for path in (settings, weights):
        with path.open("rb") as f:
            os.fsync(f.fileno())
