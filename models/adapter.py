"""Adapters on disk, in PEFT's layout: adapter_model.safetensors and adapter_config.json.

PEFT writes the dotted name of a layer behind `base_model.model.`; its reader and ours take each other's
files. An adapter is written aside, read back and compared before it gets its name, because an adapter file
that turns out empty is found out when the training is long over.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.errors import CheckpointError
from models.lora import LoraConfig, adapted_layers, attach_lora
from models.readers import SafetensorsReader, read_json

PREFIX = "base_model.model."


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write the adapters, then read them back and compare every number."""
    tensors = adapter_tensors(model)
    if not tensors:
        raise ValueError("the model has no adapters; attach_lora makes them")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / ".adapter_model.safetensors.partial"
    save_file({PREFIX + n: t.cpu().contiguous() for n, t in tensors.items()}, partial, {"format": "pt"})
    verify(partial, tensors)
    config = directory / ".adapter_config.json.partial"
    config.write_text(json.dumps(peft_config(model), indent=2) + "\n", encoding="utf-8")
    for path, name in ((partial, "adapter_model.safetensors"), (config, "adapter_config.json")):
        with path.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(path, directory / name)


@torch.no_grad()
def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Attach the adapters of a directory to a model that has none."""
    directory = Path(directory)
    if not (directory / "adapter_config.json").exists():
        raise CheckpointError(f"{directory}: no adapter_config.json; is it an adapter's directory?")
    reader = SafetensorsReader(directory / "adapter_model.safetensors")
    names = {released_name(name): name for name in reader.shapes}
    layers = sorted({name.rpartition(".lora_")[0] for name in names})
    config = lora_config(directory / "adapter_config.json", layers)
    try:
        attach_lora(model, config)
    except ValueError as error:
        raise CheckpointError(f"{directory}: does not fit this model ({error})") from error

    expected = adapter_tensors(model)
    problems = [f"lacks {n}" for n in expected if n not in names]
    problems += [f"has {n}, which this model has no place for" for n in names if n not in expected]
    problems += [
        f"{n} is {list(reader.shapes[names[n]])}, expected {list(t.shape)}"
        for n, t in expected.items()
        if n in names and reader.shapes[names[n]] != tuple(t.shape)
    ]
    if problems:
        detach(model)
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(f"{reader.path}: the adapter is for another model: {shown}")
    for name, tensor in expected.items():
        tensor.copy_(reader.read(names[name]))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapted layer, under the layer's dotted name."""
    tensors = {}
    for name, layer in adapted_layers(model):
        assert layer.lora_A is not None
        assert layer.lora_B is not None
        tensors[f"{name}.lora_A.weight"] = layer.lora_A.weight.detach()
        tensors[f"{name}.lora_B.weight"] = layer.lora_B.weight.detach()
    return tensors


def detach(model: nn.Module) -> None:
    """Take the adapters off again."""
    for _, layer in list(adapted_layers(model)):
        layer.lora_A = layer.lora_B = layer.lora_config = None


def verify(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise unless the file holds exactly these tensors."""
    reader = SafetensorsReader(path)
    wrong = [n for n, t in tensors.items() if not torch.equal(reader.read(PREFIX + n), t.cpu())]
    if wrong or len(reader.shapes) != len(tensors):
        raise RuntimeError(f"{path}: {wrong or 'tensor count'} differs after writing; the disk may be failing")


def peft_config(model: nn.Module) -> dict[str, Any]:
    """adapter_config.json, as PEFT writes it for this configuration."""
    config = next(adapted_layers(model))[1].lora_config
    assert isinstance(config, LoraConfig)
    return {
        "peft_type": "LORA",
        "task_type": getattr(model, "task_type", None),
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in adapted_layers(model)}),
        "modules_to_save": None,
        "use_rslora": config.rslora,
        "use_dora": False,
    }


# Fields that change what an adapter computes and that we do not, with the value that means "not used".
UNKNOWN = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, []),
}


def lora_config(path: Path, layers: list[str]) -> LoraConfig:
    """The configuration in an adapter_config.json; `layers` are those that the tensors are for."""
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {raw.get('peft_type')!r}; LORA is what can be read")
    for key, neutral in UNKNOWN.items():
        if key in raw and raw[key] not in neutral:
            raise CheckpointError(f"{path}: {key} is {raw[key]!r}, which is not supported here")
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or raw.get("layers_to_transform") is not None:
        targets = layers  # PEFT also takes a pattern here, or some layers only: the tensors know which
    try:
        return LoraConfig(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout", 0.0),
            target_modules=tuple(targets),
            rslora=bool(raw.get("use_rslora")),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a usable LoRA configuration ({error!r})") from error


def released_name(name: str) -> str:
    """The parameter that a tensor of the file is for."""
    return name.removeprefix(PREFIX).replace(".default.", ".")
