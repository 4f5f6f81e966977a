"""What a saved adapter holds, layer by layer, without the model that it is for.

||s B A|| tells how far a layer's weight is moved. It comes from two small products: the square is the sum of
(BᵀB) ∘ (A Aᵀ), which are (rank, rank) each, so that B A itself is never made.

Two forms are read: PEFT's directory, and the one file of microsoft/LoRA, whose names end in `lora_A` and `lora_B` and
which does not say what alpha was.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models.adapter import released_name
from models.errors import CheckpointError
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
        fitting = (a for key, a in self.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?({key})", name))
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
        return summary("microsoft/LoRA's file", path, TorchReader(path), ".lora_A", None)
    directory = path if path.is_dir() else path.parent
    file = directory / "adapter_model.safetensors"
    if not file.exists() and (directory / "adapter_model.bin").exists():
        file = directory / "adapter_model.bin"
    reader = TorchReader(file) if file.suffix == ".bin" else SafetensorsReader(file)
    return summary("PEFT's directory", file, reader, ".lora_A.weight", read_settings(directory / "adapter_config.json"))


def read_settings(path: Path) -> Settings:
    """The settings of an adapter whose model need not be known."""
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {raw.get('peft_type')!r:.80}; LORA is what can be read")
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


def finite(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{where} is {value!r:.80}; a finite number is needed")
    return float(value)


def summary(form: str, file: Path, reader: Reader, end: str, settings: Settings | None) -> SavedAdapter:
    """What the file holds; `end` is how the names of A end there."""
    names = {released_name(name): name for name in reader.shapes}
    of_a = [name for name in names if name.endswith(end)]
    other = end.replace("lora_A", "lora_B")
    layers = []
    for name in of_a:
        owner = name.removesuffix(end)
        if owner + other not in names:
            raise CheckpointError(f"{file}: {owner} has an A but no B; the file is not whole")
        a, b = reader.read(names[name]), reader.read(names[owner + other])
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise CheckpointError(
                f"{file}: A and B of {owner} are {list(a.shape)} and {list(b.shape)}, which do not multiply"
            )
        scaling = None if settings is None else settings.scaling(owner, len(a))
        layers.append(AdapterLayer(owner, len(a), scaling, norm(a), norm(b), product_norm(b, a) * (scaling or 1.0)))
    if not layers:
        raise CheckpointError(f"{file}: holds no adapter; none of its {len(names)} tensors ends in {end}")
    paired = {owner + e for owner in (layer.name for layer in layers) for e in (end, other)}
    nbytes: dict[str, int] = {}
    for name in reader.shapes:
        kind, size = reader.stored(name)
        nbytes[kind] = nbytes.get(kind, 0) + size
    return SavedAdapter(
        form=form,
        file=str(file),
        settings=settings,
        layers=layers,
        whole={name: reader.shapes[names[name]] for name in names if name not in paired},
        parameters=sum(math.prod(shape) for shape in reader.shapes.values()),
        nbytes=nbytes,
    )


def product_norm(b: Float[Tensor, "N R"], a: Float[Tensor, "R K"]) -> float:
    """||B A|| from the Gram matrices of both, in float64."""
    a, b = a.double(), b.double()
    return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix.double()))


def by_block(layers: list[AdapterLayer]) -> dict[str, dict[str, AdapterLayer]]:
    """The layers of each block by their type: as much of the end of a name as tells them apart."""
    longest = max(layer.name.count(".") + 1 for layer in layers)
    places: dict[tuple[str, str], AdapterLayer] = {}
    for depth in range(1, longest + 1):
        places = {place(layer.name, depth): layer for layer in layers}
        if len(places) == len(layers):
            break
    table: dict[str, dict[str, AdapterLayer]] = {}
    for (block, kind), layer in sorted(places.items(), key=lambda item: counted(item[0][0])):
        table.setdefault(block, {})[kind] = layer
    return table


def place(name: str, depth: int) -> tuple[str, str]:
    """A layer's block, up to the first number in its name, and the last `depth` parts of the rest."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), -1)
    return ".".join(parts[: first + 1]), ".".join(parts[first + 1 :][-depth:])


def counted(block: str) -> list[tuple[int, str]]:
    """A key that puts block 10 behind block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in block.split(".")]
