"""Adapters as microsoft/LoRA's examples saved them: one torch file of `<layer>.lora_A`, `<layer>.lora_B` and a head.

The file has no configuration. Rank is what the tensors have; alpha is not in it, and was 16 in their GLUE runs of
RoBERTa. All else in the file, such as `classifier.*`, was trained whole.
"""

import logging
from pathlib import Path

from torch import nn

from models.errors import CheckpointError
from models.lora_config import LoraConfig
from models.model import Model
from models.readers import Reader, RenamedReader, TorchReader

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
ALPHA = 16.0

log = logging.getLogger(__name__)


def loralib_file(path: Path) -> Path | None:
    """The file, if the path is one or a directory with nothing else to be taken for an adapter."""
    if path.is_file() and path.suffix in SUFFIXES:
        return path
    if not path.is_dir() or (path / "adapter_config.json").exists():
        return None
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    return files[0] if len(files) == 1 else None


def read_loralib(file: Path, model: nn.Module, alpha: float | None) -> tuple[Reader, LoraConfig]:
    """The tensors under the names of the model's parameters, and the configuration that they imply."""
    theirs = TorchReader(file)
    if not any(name.endswith((".lora_A", ".lora_B")) for name in theirs.shapes):
        raise CheckpointError(f"{file}: holds no lora_A and lora_B; it is no adapter of microsoft/LoRA's examples")
    placeless = [name for name in theirs.shapes if parameter(name, model) is None]
    if placeless:
        raise CheckpointError(
            f"{file}: the adapter is for another model: it has {placeless[0]}, for which this one has no place; for a "
            "trained classifier, load the base with head='classification' and its num_labels"
        )
    reader = RenamedReader(theirs, lambda name: parameter(name, model))
    layers = sorted(name.removesuffix(".lora_A.weight") for name in reader.shapes if name.endswith(".lora_A.weight"))
    ranks = {layer: rank(reader, layer) for layer in layers}
    whole = {name.split(".")[0] for name in reader.shapes if not name.endswith((".lora_A.weight", ".lora_B.weight"))}
    if alpha is None:
        log.warning("%s does not say its alpha; taking %g, as in its project's GLUE runs", file, ALPHA)
    most = max(ranks.values(), key=list(ranks.values()).count)
    return reader, LoraConfig(
        rank=most,
        alpha=ALPHA if alpha is None else alpha,
        dropout=0.0,
        target_modules=tuple(layers),
        rank_pattern={layer: r for layer, r in ranks.items() if r != most},
        modules_to_save=tuple(sorted(whole)),
    )


def parameter(name: str, model: nn.Module) -> str | None:
    """The parameter here that a tensor is for."""
    layer, _, part = name.rpartition(".")
    adapter = part in ("lora_A", "lora_B")
    known = f"{layer}.weight" if adapter else name
    ours = model.parameter_named(known) if isinstance(model, Model) else known
    return f"{ours.removesuffix('.weight')}.{part}.weight" if adapter and ours is not None else ours


def rank(reader: Reader, layer: str) -> int:
    """The rank of a layer's adapter; one adapter for several weights stacked on each other is refused."""
    shapes = [reader.shapes.get(f"{layer}.{part}.weight", ()) for part in ("lora_A", "lora_B")]
    where = reader.where(f"{layer}.lora_A.weight")
    if [len(shape) for shape in shapes] != [2, 2] or 0 in shapes[0]:
        raise CheckpointError(f"{where}: {layer} has lora_A {list(shapes[0])} and lora_B {list(shapes[1])}, not a pair")
    a, b = shapes
    if a[0] != b[1]:
        fused = b[1] > 0 and a[0] % b[1] == 0
        kind = "a fused layer (MergedLinear: query, key and value in one)" if fused else "no pair of one rank"
        raise CheckpointError(f"{where}: {layer} has lora_A {list(a)} and lora_B {list(b)}, {kind}; not supported here")
    return a[0]
