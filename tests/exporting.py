"""A run that has learned something, and the export command on it."""

import json
from pathlib import Path
from typing import Any

import torch

import models
import nf4
import qlora
from models.llama import Llama, causal


def trained_run(base: Path, directory: Path) -> Path:
    """A run as `qlora train` leaves it, with an adapter that has learned."""
    model = models.load(base, nf4.QuantConfig(), torch.float32)
    models.attach_lora(model, models.LoraConfig(rank=4, alpha=8, target_modules=("q_proj", "down_proj")))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    models.save_adapter(model, directory / "adapter")
    (directory / "config.toml").write_text(f'model = "{base.as_posix()}"\ndtype = "float32"\nquantize = true\n')
    return directory


def as_run(run: Path, base: Path) -> Llama:
    """The run's model: base in 4 bits, adapter on it."""
    model = models.load(base, nf4.QuantConfig(), torch.float32)
    models.load_adapter(model, run / "adapter")
    return causal(model, "a test")


def export(*arguments: Any, code: int = 0) -> None:
    assert qlora.main(["export", *map(str, arguments), "--json"]) == code


def told(capsys: Any, *arguments: Any, code: int = 0) -> Any:
    """What the command prints: its result, or why there is none."""
    export(*arguments, code=code)
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 else err
