"""What a command's TARGET names: a checkpoint, or a run, which is a checkpoint with its adapter."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from models.adapter import load_adapter
from models.checkpoint import load
from models.device import pick_device, pick_dtype
from models.errors import CheckpointError
from models.model import Model
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


@dataclass(frozen=True)
class Target:
    """The parts that a path stands for."""

    base: Path
    adapter: Path | None
    quant: QuantConfig | None
    """How the base is quantized on loading; None: it is taken as it is."""
    dtype: str | None
    """What the run computed in; None for a checkpoint."""


def load_target(target: str | Path, options: LoadOptions = LoadOptions()) -> tuple[Model, Tokenizer]:
    """The model and tokenizer that a path names, with the run's base, format and adapter if it is a run."""
    parts = resolve(target, options)
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    model = load(parts.base, parts.quant, dtype, device, options.head, options.num_labels)
    if parts.adapter is not None:
        load_adapter(model, parts.adapter)
    return model.eval(), load_tokenizer(parts.base)


def resolve(target: str | Path, options: LoadOptions = LoadOptions()) -> Target:
    """Which base, adapter and format a path and the options over it name; nothing is loaded yet."""
    target = Path(target)
    adapter = Path(options.adapter) if options.adapter is not None else None
    if not (target / "config.toml").exists():
        return Target(target, adapter, options.quant if options.quantize else None, None)
    run = read_run(target / "config.toml")
    if not (target / "adapter" / "adapter_config.json").exists():
        raise CheckpointError(f"{target}: a run without an adapter; it may not have finished (see STATUS)")
    quantize, quant = options.quantize, options.quant
    if quantize is None:
        quantize, quant = run.get("quantize", True), run_quant(run, target / "config.toml")
    return Target(Path(run["model"]), adapter or target / "adapter", quant if quantize else None, run.get("dtype"))


def read_run(path: Path) -> dict[str, Any]:
    try:
        run = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a run's settings ({error})") from error
    if not isinstance(run.get("model"), str) or not isinstance(run.get("dtype", "auto"), str):
        raise CheckpointError(f"{path}: does not say which model the run started from, or in which dtype")
    return run


def run_quant(run: dict[str, Any], path: Path) -> QuantConfig:
    known = {f.name for f in fields(QuantConfig)}
    stored = run.get("quant", {})
    try:
        return QuantConfig(**{key: value for key, value in stored.items() if key in known})
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: quant is not a 4-bit format ({error})") from error
