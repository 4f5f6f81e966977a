"""Which parts of a model are stored in 4 bits and which stay in 16, said in this one place, and what each takes.

The class of a module decides. A `models.linear.Linear` of a block may be stored in few bits, because it is most
of the model and because an adapter beside it can learn around the rounding. Everything else keeps the precision that
the model computes in; `PARTS` says why.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from models.linear import AdaptableLinear, NF4Linear
from models.model import Model
from models.readers import dtype_name

QUANTIZED = "quantized linears"
ADAPTERS = "adapters"
PARTS = {
    QUANTIZED: "nearly all weights are here, and an adapter beside each can learn around the rounding",
    "block linears": "not quantized in this model",
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
        """All that is stored for the part, for each of its numbers; 0 for a part without any."""
        return 8 * sum(self.nbytes.values()) / self.parameters if self.parameters else 0.0

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
            q = module.quantized
            codes = q.packed.nbytes
            parts[QUANTIZED].add(q.numel, {f"{q.config.codebook} codes": codes, "scales": q.nbytes - codes})
        elif not (isinstance(module, NF4Linear) and leaf == "absmax_codes"):
            kind = dtype_name(parameter.dtype)
            parts[part_of(model, name)].add(parameter.numel(), {kind: parameter.nbytes})
    return parts


def part_of(model: nn.Module, name: str) -> str:
    """The part that a parameter belongs to, as long as it is not quantized."""
    module, leaf = owner(model, name)
    if "lora_" in name:
        return ADAPTERS
    if isinstance(module, AdaptableLinear):
        return "biases" if leaf == "bias" else "block linears"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    return "norms" if type(module).__name__.endswith("Norm") else "head"


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a parameter belongs to, and what it is called there."""
    module, _, leaf = plain_name(name).rpartition(".")
    return model.get_submodule(module), leaf


def plain_name(name: str) -> str:
    """A parameter's name in files, also while torch keeps another behind it that is trained in a wider dtype."""
    return re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)


def statement(parts: Parts) -> str:
    """What is stored in few bits and what is not and why, in a few lines."""
    quantized = parts[QUANTIZED]
    lines = []
    if quantized.tensors:
        codebook = next(kind.removesuffix(" codes") for kind in quantized.nbytes if kind.endswith(" codes"))
        lines.append(
            f"in {codebook}, {quantized.bits_per_weight:.3f} bits per weight: {quantized.tensors} linear layers of the "
            f"blocks, {short(quantized.parameters)} weights ({PARTS[QUANTIZED]})"
        )
    rest: dict[str, list[str]] = {}
    for part in parts:
        if part is not quantized:
            described = f"{part.name}, {short(part.parameters)} ({PARTS[part.name]})"
            rest.setdefault(" and ".join(part.nbytes), []).append(described)
    lines += [f"in {kinds}: {'; '.join(described)}" for kinds, described in rest.items()]
    return "\n".join(lines)


def short(count: int) -> str:
    """A count in three or four digits: 576, 35.1 k, 106.2 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return str(count)
