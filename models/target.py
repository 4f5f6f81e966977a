"""What a command's TARGET names: a checkpoint, or a run, which is a checkpoint with its adapter."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

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
    dtype: str = "auto"
    """Compute in auto, bfloat16, float16 or float32; auto is bfloat16 where the device multiplies it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


def load_target(target: str | Path, options: LoadOptions = LoadOptions()) -> tuple[Model, Tokenizer]:
    """The model and tokenizer that a path names, with the run's base, format and adapter if it is a run."""
    target = Path(target)
    base, adapter, quantize, quant = target, options.adapter, options.quantize, options.quant
    if (target / "config.toml").exists():
        run = tomllib.loads((target / "config.toml").read_text(encoding="utf-8"))
        if not (target / "adapter" / "adapter_config.json").exists():
            raise CheckpointError(f"{target}: a run without an adapter; it may not have finished (see STATUS)")
        base, adapter = Path(run["model"]), adapter or str(target / "adapter")
        if quantize is None:
            known = {f.name for f in fields(QuantConfig)}
            quantize = run.get("quantize", True)
            quant = QuantConfig(**{k: v for k, v in run.get("quant", {}).items() if k in known})
    device = pick_device(options.device)
    model = load(base, quant if quantize else None, pick_dtype(options.dtype, device), device)
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval(), load_tokenizer(base)
