"""What a command's TARGET names: a checkpoint, or a run, which is a checkpoint with its adapter or a whole model.

A run that labels texts says how in its own files, since an adapter's do not: its task in config.toml, the names of the
labels in data/manifest.json.
"""

import tomllib
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from models.adapter import prepare_adapter
from models.checkpoint import unprepared
from models.device import pick_device, pick_dtype
from models.errors import CheckpointError
from models.labelled import HEADS, load_labelled
from models.model import Model
from models.parallel.loading import loading
from models.parallel.shard import ShardConfig
from models.readers import read_json
from models.tokenizer import Tokenizer, load_tokenizer
from nf4 import QuantConfig


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How to load a model for use."""

    adapter: str | None = None
    """Directory of an adapter to put on the model; a run brings its own."""
    quantize: bool | None = None
    """Store block linears in 4 bits; by default as the run was trained, and not for a checkpoint."""
    quant: QuantConfig = QuantConfig()
    """The 4-bit format, where it is quantized here."""
    head: str | None = None
    """lm, mlm, classification or regression; by default what the checkpoint holds."""
    num_labels: int | None = None
    """Classes of a classification head that is not in the checkpoint but in the adapter."""
    dtype: str = "auto"
    """Compute in auto, bfloat16, float16 or float32; auto is bfloat16 where the device multiplies it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    distributed: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: ddp gives each the whole model, fsdp a share of it."""
    fsdp: ShardConfig = ShardConfig()
    """How a model is shared."""


@dataclass(frozen=True)
class Target:
    """The parts that a path stands for."""

    base: Path
    adapter: Path | None
    quant: QuantConfig | None
    """How the base is quantized on loading; None: it is taken as it is."""
    dtype: str | None = None
    """What the run computed in; None for a checkpoint."""
    head: str | None = None
    """classification or regression, where the run put such a head on its base; None: what the base holds."""
    labels: tuple[str, ...] = ()
    """The classes by number."""
    run: Path | None = None
    """The run, if it is one."""


def load_target(target: str | Path, options: LoadOptions = LoadOptions()) -> tuple[Model, Tokenizer]:
    """The model and tokenizer that a path names, with the run's base, format and adapter if it is a run."""
    parts = resolve(target, options)
    device = pick_device(options.device)
    model = load_parts(parts, options, pick_dtype(options.dtype, device), device)
    return model, load_tokenizer(parts.base)


def load_parts(parts: Target, options: LoadOptions, dtype: torch.dtype, device: torch.device) -> Model:
    """Base and adapter in one model; an adapter's head comes with it."""
    how = loading(options.distributed, options.fsdp)
    prepare = unprepared if parts.adapter is None else partial(prepare_adapter, path=parts.adapter)
    if parts.head is not None and options.head is None:
        return load_labelled(parts.base, parts.head, parts.labels, parts.quant, dtype, device, prepare, how)
    return how(parts.base, parts.quant, dtype, device, options.head, options.num_labels, prepare=prepare)


def resolve(target: str | Path, options: LoadOptions = LoadOptions()) -> Target:
    """Which base, adapter and format a path and the options over it name; nothing is loaded yet."""
    target = Path(target)
    adapter = Path(options.adapter) if options.adapter is not None else None
    if not (target / "config.toml").exists():
        return Target(target, adapter, options.quant if options.quantize else None)
    run = read_run(target / "config.toml")
    whole = not run.get("adapters", True)
    leaves = target / "model" / "config.json" if whole else target / "adapter" / "adapter_config.json"
    if not leaves.exists():
        what = "a model" if whole else "an adapter"
        raise CheckpointError(f"{target}: a run without {what}; it may not have finished (see STATUS)")
    if whole:
        return Target(leaves.parent, adapter, options.quant if options.quantize else None, run.get("dtype"), run=target)
    quantize, quant = options.quantize, options.quant
    if quantize is None:
        quantize, quant = run.get("quantize", True), run_quant(run, target / "config.toml")
    return Target(
        base=Path(run["model"]),
        adapter=adapter or leaves.parent,
        quant=quant if quantize else None,
        dtype=run.get("dtype"),
        head=run["task"] if run.get("task") in HEADS else None,
        labels=run_labels(target / "data" / "manifest.json") if run.get("task") in HEADS else (),
        run=target,
    )


def read_run(path: Path) -> dict[str, Any]:
    try:
        run = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a run's settings ({error})") from error
    if not isinstance(run.get("model"), str) or not isinstance(run.get("dtype", "auto"), str):
        raise CheckpointError(f"{path}: does not say which model the run started from, or in which dtype")
    return run


def run_labels(path: Path) -> tuple[str, ...]:
    """The classes that a run's data has, by number."""
    labels = read_json(path).get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise CheckpointError(f"{path}: labels is {labels!r:.80}; a list of names is needed")
    return tuple(labels)


def run_quant(run: dict[str, Any], path: Path) -> QuantConfig:
    known = {f.name for f in fields(QuantConfig)}
    stored = run.get("quant", {})
    try:
        return QuantConfig(**{key: value for key, value in stored.items() if key in known})
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: quant is not a 4-bit format ({error})") from error
