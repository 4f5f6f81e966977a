"""What a saved adapter holds, layer by layer, without the model that it is for.

||s B A|| tells how far a layer's weight is moved. It comes from two small products: the square is the sum of
(BᵀB) ∘ (A Aᵀ), which are (rank, rank) each, so that B A itself is never made.

Two forms are read: PEFT's directory, and the one file of microsoft/LoRA, whose names end in `lora_A` and `lora_B` and
which does not say what alpha was. (What other methods than LoRA leave is in `models/adapter_vectors.py`.)
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models.adapter_vectors import KINDS, Vector, read_vectors
from models.config_fields import finite
from models.errors import CheckpointError
from models.lora_config import fits
from models.peft_names import released_name
from models.readers import Reader, SafetensorsReader, TorchReader, read_json


@dataclass(frozen=True)
class AdapterLayer:
    """One layer's adapter; norms are Frobenius norms."""

    name: str
    rank: int
    scaling: float | None
    """s; None where the file does not tell."""
    a: float
    b: float
    delta: float
    """||s B A||, or ||B A|| where s is not known."""


@dataclass(frozen=True)
class Settings:
    """What an adapter_config.json says that the norms depend on."""

    alpha: float
    alpha_pattern: dict[str, float]
    rslora: bool
    dora: bool
    init: str | bool | None

    def scaling(self, name: str, rank: int) -> float:
        """s of the layer that is called `name`; of several patterns that fit, PEFT takes the first."""
        fitting = (a for key, a in self.alpha_pattern.items() if fits(key, name))
        return next(fitting, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk."""

    form: str
    file: str
    settings: Settings | None
    """None where the file comes without any."""
    layers: list[AdapterLayer]
    whole: dict[str, tuple[int, ...]]
    """Shapes of the tensors beside A and B: magnitudes of DoRA, and modules that were trained whole."""
    parameters: int
    nbytes: dict[str, int]
    """Bytes by dtype."""
    method: str = "LORA"
    """As adapter files call it."""
    vectors: list[Vector] = field(default_factory=list)
    """What other methods than LoRA have instead of layers."""


def is_adapter(path: Path) -> bool:
    """A directory or file of PEFT's, or a torch file with microsoft/LoRA's names in it."""
    if path.is_dir():
        return (path / "adapter_config.json").exists()
    if path.name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        return True
    return path.suffix == ".bin" and any(name.endswith(".lora_A") for name in TorchReader(path).shapes)


def read_adapter(path: Path) -> SavedAdapter:
    """Read the tensors one layer at a time."""
    peft = path.is_dir() or path.name.startswith("adapter_")
    if not peft:
        return summary("microsoft/LoRA's file", path, TorchReader(path), None)
    directory = path if path.is_dir() else path.parent
    file = directory / "adapter_model.safetensors"
    if not file.exists() and (directory / "adapter_model.bin").exists():
        file = directory / "adapter_model.bin"
    reader = TorchReader(file) if file.suffix == ".bin" else SafetensorsReader(file)
    config = directory / "adapter_config.json"
    raw = read_json(config)
    if raw.get("peft_type") not in (*KINDS, "LORA"):
        known = ", ".join(("LORA", *KINDS))
        raise CheckpointError(f"{config}: peft_type is {raw.get('peft_type')!r:.80}; what can be read is {known}")
    if raw["peft_type"] in KINDS:
        return summary_of_vectors(raw, file, reader)
    return summary("PEFT's directory", file, reader, read_settings(config, raw))


def read_settings(path: Path, raw: dict[str, Any]) -> Settings:
    """The settings of a LoRA adapter whose model need not be known."""
    pattern = raw.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise CheckpointError(f"{path}: alpha_pattern is {pattern!r:.80}; layers with their alphas are needed")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise CheckpointError(
                f"{path}: alpha_pattern: {key!r:.80} is not a regular expression ({error})"
            ) from error
    return Settings(
        alpha=finite(raw.get("lora_alpha"), f"{path}: lora_alpha"),
        alpha_pattern={key: finite(alpha, f"{path}: alpha_pattern: {key}") for key, alpha in pattern.items()},
        rslora=bool(raw.get("use_rslora")),
        dora=bool(raw.get("use_dora")),
        init=raw.get("init_lora_weights"),
    )


def summary(form: str, file: Path, reader: Reader, settings: Settings | None) -> SavedAdapter:
    """What the file holds, one layer read at a time."""
    pairs: dict[str, dict[str, str]] = {}
    whole, nbytes = {}, Counter[str]()
    for name, shape in reader.shapes.items():
        kind, size = reader.stored(name)
        nbytes[kind] += size
        ours = released_name(name)
        layer, _, part = ours.removesuffix(".weight").rpartition(".")
        if part in ("lora_A", "lora_B"):
            pairs.setdefault(layer, {})[part] = name
        else:
            whole[ours] = shape
    if not pairs:
        raise CheckpointError(f"{file}: holds no adapter; none of its {len(whole)} tensors is a lora_A or lora_B")
    return SavedAdapter(
        form=form,
        file=str(file),
        settings=settings,
        layers=[layer_norms(name, pair, reader, settings) for name, pair in pairs.items()],
        whole=whole,
        parameters=sum(math.prod(shape) for shape in reader.shapes.values()),
        nbytes=dict(nbytes),
    )


def summary_of_vectors(raw: dict[str, Any], file: Path, reader: Reader) -> SavedAdapter:
    """The same of another method than LoRA."""
    nbytes = Counter[str]()
    for name in reader.shapes:
        kind, size = reader.stored(name)
        nbytes[kind] += size
    return SavedAdapter(
        form="PEFT's directory" if raw["peft_type"] != "BITFIT" else "a directory like PEFT's",
        file=str(file),
        settings=None,
        layers=[],
        whole={},
        parameters=sum(math.prod(shape) for shape in reader.shapes.values()),
        nbytes=dict(nbytes),
        method=raw["peft_type"],
        vectors=read_vectors(reader, raw, str(file)),
    )


def layer_norms(name: str, pair: dict[str, str], reader: Reader, settings: Settings | None) -> AdapterLayer:
    where = reader.where(next(iter(pair.values())))
    if len(pair) < 2:
        raise CheckpointError(f"{where}: {name} has only {next(iter(pair))} of its two; the file is not whole")
    a, b = reader.read(pair["lora_A"]), reader.read(pair["lora_B"])
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise CheckpointError(
            f"{where}: A and B of {name} are {list(a.shape)} and {list(b.shape)}, which do not multiply"
        )
    rank = len(a)
    scaling = None if settings is None else settings.scaling(name, rank)
    return AdapterLayer(
        name, rank, scaling, norm(a), norm(b), product_norm(b, a) * (1.0 if scaling is None else scaling)
    )


def product_norm(b: Float[Tensor, "N R"], a: Float[Tensor, "R K"]) -> float:
    """||B A|| from the Gram matrices of both, in float64."""
    a, b = a.double(), b.double()
    return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix.double()))
