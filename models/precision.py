"""Which parts of a model are stored in 4 bits and which stay in 16, said in this one place, and what each takes.

The class of a module decides. A `models.linear.Linear` of a block may be stored in few bits, because it is most
of the model and because an adapter beside it can learn around the rounding. Everything else keeps the precision that
the model computes in; `PARTS` says why. The bytes are counted for a loaded model and for one on disk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from models.checkpoint import Source, matched, open_checkpoint, record, skeleton
from models.errors import CheckpointError
from models.linear import AdaptableLinear, NF4Linear
from models.model import Model
from models.readers import dtype_name
from models.whole import plain_name
from nf4.storage import read_state

QUANTIZED = "quantized linears"
ADAPTERS = "adapters"
SCALES = "scales"
TABLES = "tables"  # a file repeats the codebook for every weight; it is the format's, not the weight's
PARTS = {
    QUANTIZED: "nearly all weights are here, and an adapter beside each can learn around the rounding",
    "block linears": "not quantized here, but what 4 bits are for",
    "biases": "one vector a layer: nothing to save",
    "embeddings": "a row is looked up as it is, with no adapter beside it",
    "norms": "one vector each: nothing to save, and an error would scale every token alike",
    "head": "an error would go straight into the answer",
    ADAPTERS: "trained, so that small updates must not be lost to rounding",
}


@dataclass
class Part:
    """What is stored of one part of a model."""

    name: str
    """A key of `PARTS`."""
    tensors: int = 0
    """How many parameters of the model belong to it; a quantized weight is one."""
    parameters: int = 0
    """How many numbers they stand for."""
    nbytes: dict[str, int] = field(default_factory=dict)
    """Bytes by what they hold: a dtype, a GGUF format, codes, scales."""

    @property
    def bits_per_weight(self) -> float:
        """What is stored for each of the part's numbers, tables aside; 0 for a part without any."""
        own = sum(nbytes for kind, nbytes in self.nbytes.items() if kind != TABLES)
        return 8 * own / self.parameters if self.parameters else 0.0

    def add(self, parameters: int, nbytes: dict[str, int]) -> None:
        """Count one more parameter of the model."""
        self.tensors += 1
        self.parameters += parameters
        for kind, count in nbytes.items():
            self.nbytes[kind] = self.nbytes.get(kind, 0) + count


class Parts:
    """Every part of a model, in the order of `PARTS`, and what it takes."""

    def __init__(self) -> None:
        self.by_name = {name: Part(name) for name in PARTS}

    def __getitem__(self, name: str) -> Part:
        return self.by_name[name]

    def __iter__(self) -> Iterator[Part]:
        return (part for part in self.by_name.values() if part.tensors)

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self)

    @property
    def nbytes(self) -> int:
        return sum(sum(part.nbytes.values()) for part in self)


def parts_in_memory(model: Model) -> Parts:
    """What a model that is loaded takes, adapters included."""
    parts = Parts()
    for name, parameter in model.named_parameters():
        module, leaf = owner(model, name)
        if isinstance(module, NF4Linear) and leaf == "weight":
            kept = {part: tensor.numel() * tensor.dtype.itemsize for part, tensor in module.kept().items()}
            codes = kept.pop("packed")
            count = module.in_features * module.out_features
            parts[QUANTIZED].add(count, {f"{module.quant_config.codebook} codes": codes, SCALES: sum(kept.values())})
        elif not (isinstance(module, NF4Linear) and leaf == "absmax_codes"):
            kind = dtype_name(parameter.dtype)
            parts[part_of(model, name)].add(parameter.numel(), {kind: parameter.nbytes})
    return parts


def parts_on_disk(model: Model, source: Source) -> Parts:
    """What a model takes in its file, of which little more than headers is read; `model` may be without memory."""
    parts = Parts()
    for name, parameter in model.named_parameters():
        if name in source.stored:
            codebook, _ = stored_format(name, source)
            nbytes: dict[str, int] = {}
            for tensor in source.stored[name]:
                kind = SCALES if tensor.endswith("absmax") else TABLES
                kind = f"{codebook} codes" if tensor == name else kind
                nbytes[kind] = nbytes.get(kind, 0) + source.reader.stored(tensor).nbytes
            parts[QUANTIZED].add(parameter.numel(), nbytes)
        elif name not in source.fresh:
            kind, size = source.reader.stored(name)
            parts[part_of(model, name)].add(parameter.numel(), {kind: size})
    return parts


def stored_format(name: str, source: Source) -> tuple[str, dict[str, Any]]:
    """The codebook of a 4-bit weight and the rest of its record, the one tensor that is read."""
    try:
        _, codebook, state = read_state(record(source.reader, source.stored[name]), name)
    except ValueError as error:
        raise CheckpointError(f"{source.reader.where(name)}: {error}") from error
    return codebook, state


def part_of(model: nn.Module, name: str) -> str:
    """The part that a parameter belongs to, as long as it is not quantized."""
    module, leaf = owner(model, name)
    if "lora_" in name or leaf in ("ia3_l", "prompt_embeddings"):
        return ADAPTERS
    if isinstance(module, AdaptableLinear) and not module.in_head:
        return "biases" if leaf == "bias" else "block linears"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    return "norms" if type(module).__name__.endswith("Norm") else "head"


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a parameter belongs to, and what it is called there."""
    module, _, leaf = plain_name(name).rpartition(".")
    return model.get_submodule(module), leaf


def statement(parts: Parts) -> str:
    """What is stored in few bits and what is not, and why: a line for each part."""
    lines = []
    for part in parts:
        kinds = " and ".join(kind for kind in part.nbytes if kind not in (SCALES, TABLES))
        stored = f"in {kinds}"
        if part.name == QUANTIZED:
            stored = f"in {kinds.replace(' codes', '')}, {part.bits_per_weight:.3f} bits each"
        lines.append(f"{part.name}: {short(part.parameters)} weights {stored}; {PARTS[part.name]}")
    return "\n".join(lines)


def statement_on_disk(path: str | Path) -> str:
    """The same of a checkpoint."""
    raw, reader, where = open_checkpoint(path)
    model = skeleton(raw, where, reader)
    return statement(parts_on_disk(model, matched(model, reader)))


def short(count: int) -> str:
    """A count in three or four digits: 576, 35.1 k, 106.2 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return str(count)
