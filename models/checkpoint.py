"""From a raw checkpoint to a model: one tensor read, cast, quantized and released at a time.

The model is built without memory first; then every tensor it wants is found, and its shape compared, before
any is read, so that a wrong or half-fetched checkpoint is refused at once and with the whole list. Peak
memory is the loaded (quantized) model plus a few copies of the largest tensor.

What is quantized: the linear layers of the blocks. Embeddings, norms and the head keep 16 bits (`dtype`).

A checkpoint may be in 4 bits already. What its tensors say counts, layer by layer: a weight with a
`quant_state` is taken as it is, any other is dense and stays dense, whatever config.json says of either. Only
the dtype is the caller's: codes decode to it. What another writer put in 4 bits though no `Linear` takes its place
here, as an embedding, is decoded. config.json just has to name a method that is read here.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kernels
import nf4
from models.architectures import CONFIGS, architecture, build
from models.errors import CheckpointError
from models.fairseq_layout import open_fairseq
from models.gguf_layout import open_gguf
from models.linear import Linear, NF4Linear
from models.meta_layout import open_meta
from models.model import Config, Model
from models.quantized_files import refuse_other_methods
from models.readers import Reader, RenamedReader, SafetensorsReader, TorchReader, first_line, open_files, read_json
from models.roberta_layout import held_labels, in_classifier
from nf4 import QuantConfig, QuantizedTensor

DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# Puts into a model what is to be trained or was trained of it, without values; and what fills it once the model has its
# own, which may be later.
Preparing = Callable[[Model], Callable[[], None]]


def unprepared(model: Model) -> Callable[[], None]:
    """Nothing to put into a model."""
    return lambda: None


def load(
    path: str | Path,
    quant: QuantConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    head: str | None = None,
    num_labels: int | None = None,
    new_head: bool = False,
    prepare: Preparing = unprepared,
) -> Model:
    """A model in evaluation mode from a directory or file in any known layout.

    With `quant`, block linears are stored in 4 bits; a checkpoint that is already quantized loads as it is.
    `head` is "lm", "mlm", "classification" or "regression", by default what the checkpoint holds; `num_labels` is
    for classification heads. `new_head` asks for one that starts from random weights, whatever the checkpoint holds.
    `prepare` gives the model its adapters.
    """
    model, values = opened(path, quant, dtype, head, num_labels, new_head)
    for name in values.shapes:
        place(model, name, values.make(name, torch.device(device)).stored)
    model.eval()
    prepare(model)()
    return model


def opened(
    path: str | Path,
    quant: QuantConfig | None,
    dtype: torch.dtype,
    head: str | None,
    num_labels: int | None,
    new_head: bool,
) -> tuple[Model, "Values"]:
    """The model without memory, and where its values come from: a checkpoint that does not fit is refused."""
    raw, reader, where = open_checkpoint(path)
    if new_head:
        reader = RenamedReader(reader, lambda name: None if in_classifier(name) else name)
    model = skeleton(raw, where, reader, head, num_labels)
    if model.fresh_head and not new_head:
        logging.getLogger(__name__).warning(
            "%s: no classification head; a new one of %d labels starts from random weights. "
            "LoraConfig(modules_to_save=('classifier',)) trains it beside the adapters.",
            where,
            len(model.config.labels),
        )
    model.source = Path(path)
    return model, Values(model, reader, quant, dtype)


@dataclass(frozen=True)
class Description:
    """What can be known of a checkpoint without reading its weights."""

    architecture: str
    """llama, t5 or roberta."""
    config: Config
    quantized: bool
    """Are some of its weights in 4 bits?"""
    labels: int | None
    """How many labels its classification head gives; None where it has no such head."""


def describe(path: str | Path) -> Description:
    """Say what kind of checkpoint it is; only its config and the headers of its files are read."""
    raw, reader, where = open_checkpoint(path)
    kind = architecture(raw, where)
    labels = held_labels(reader.shapes) if kind == "roberta" else None
    return Description(kind, CONFIGS[kind](raw, where), bool(stored_in_4_bits(reader)), labels)


def skeleton(
    raw: dict[str, Any], where: str, reader: Reader, head: str | None = None, num_labels: int | None = None
) -> Model:
    """The model that a config describes, with shapes and names but no memory."""
    refuse_other_methods(raw, where, reader.shapes)
    try:
        with torch.device("meta"):
            return build(raw, where, reader.shapes, head, num_labels)
    except (RuntimeError, OverflowError) as error:  # sizes whose product is more than torch can count
        raise CheckpointError(f"{where}: no model has such sizes ({first_line(error)})") from error


def stream(
    model: Model, reader: Reader, quant: QuantConfig | None, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor | QuantizedTensor, Tensor | None]]:
    """Every parameter of the model as (name, what to store, the dense weight if it was quantized here)."""
    values = Values(model, reader, quant, dtype)
    for name in values.shapes:
        made = values.make(name, device)
        yield name, made.stored, made.dense


class Made(NamedTuple):
    """What a parameter is to hold."""

    stored: Tensor | QuantizedTensor
    dense: Tensor | None = None
    """The weight that was quantized here."""


class Values:
    """What a model's parameters are to hold, each made of its checkpoint when it is asked for."""

    def __init__(self, model: Model, reader: Reader, quant: QuantConfig | None, dtype: torch.dtype) -> None:
        model.check_dtype(dtype)
        self.reader, self.stored, self.fresh = matched(model, reader)
        self.linears = linear_weights(model)
        self.quant, self.dtype = quant, dtype
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def make(self, name: str, device: torch.device) -> Made:
        """The value of one parameter."""
        with self.blaming(name):
            if name in self.fresh:
                return Made(self.fresh[name].to(device, self.dtype))
            if name in self.stored:
                q = self.as_stored(name, {part: self.reader.read(part) for part in self.stored[name]}).to(device)
                return Made(q if name in self.linears else kernels.dequantize(q, self.dtype))
            weight = self.dense(name, device)
            if self.quantizes(name):
                assert self.quant is not None
                return Made(replace(kernels.quantize(weight, self.quant, name=name), dtype=self.dtype), weight)
            refuse_non_finite(weight, name)
            return Made(weight)

    def dense(self, name: str, device: torch.device) -> Tensor:
        """A weight that is dense in the file: as it is to be stored, or as it is to be quantized."""
        weight = check_dense(name, self.reader.read(name)).to(device)
        released = self.reader.released_dtype if self.quantizes(name) else None
        return weight.to(released or self.dtype)

    def as_stored(self, name: str, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """A weight that the file has in 4 bits, of the tensors that make it up."""
        return replace(read_stored(name, self.shapes[name], tensors, self.quant), dtype=self.dtype)

    def quantizes(self, name: str) -> bool:
        """Is the parameter dense in the file, and to be stored in 4 bits?"""
        return self.quant is not None and not self.stored and name in self.linears and not self.linears[name].in_head

    @contextmanager
    def blaming(self, name: str) -> Iterator[None]:
        """Around what reads a parameter: what is wrong with it is the checkpoint's fault."""
        try:
            yield
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{self.reader.where(name)}: {error}") from error


class Source(NamedTuple):
    """Where each of a model's parameters comes from."""

    reader: RenamedReader
    """The file's tensors under the names of the parameters."""
    stored: dict[str, list[str]]
    """The weights that the file has in few bits, each with the names of all tensors that make it up."""
    fresh: dict[str, Tensor]
    """What parameters start from that the file lacks."""


def matched(model: Model, reader: Reader) -> Source:
    """The source of every parameter, nothing read yet; a file that does not fit the model is refused."""
    renamed = RenamedReader(reader, model.parameter_named)
    stored = stored_in_4_bits(renamed)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    absent = {name: model.initial(name, shape) for name, shape in expected.items() if name not in renamed.shapes}
    fresh = {name: value for name, value in absent.items() if value is not None}
    needed = {name: shape for name, shape in expected.items() if name not in fresh}
    check_names(needed, renamed, stored)
    return Source(renamed, stored, fresh)


def linear_weights(model: Model) -> dict[str, Linear]:
    """The parameters that may be stored in few bits, with their layers."""
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Linear)}


def place(model: nn.Module, name: str, value: Tensor | QuantizedTensor) -> None:
    """Put a parameter into the model, or a part of it; a quantized weight brings the layer that can use it."""
    owner, leaf = name.rpartition(".")[::2]
    module = model.get_submodule(owner)
    if isinstance(value, QuantizedTensor):
        assert isinstance(module, Linear)
        model.set_submodule(owner, NF4Linear(value, module.bias, module.in_head))
    else:
        setattr(module, leaf, nn.Parameter(value))


def open_checkpoint(path: str | Path) -> tuple[dict[str, Any], Reader, str]:
    """The config in released field names, a reader of the tensors, and the file that gave the config."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.suffix == ".gguf":
        return *open_gguf(path), str(path)
    if path.suffix == ".pt":
        return *open_fairseq(path), str(path)
    if path.suffix in (".safetensors", ".bin"):
        reader = SafetensorsReader(path) if path.suffix == ".safetensors" else TorchReader(path)
        return released_config(path.parent), reader, str(path.parent / "config.json")
    directory = path if path.is_dir() else path.parent
    if (directory / "config.json").exists():
        return released_config(directory), open_files(directory), str(directory / "config.json")
    if (directory / "params.json").exists():
        return *open_meta(directory), str(directory / "params.json")
    single = sorted([*directory.glob("*.gguf"), *directory.glob("*.pt")]) if path.is_dir() else []
    if len(single) == 1:
        return open_checkpoint(single[0])
    raise CheckpointError(
        f"{path}: not a checkpoint; looked for config.json, params.json and one *.gguf or *.pt"
        + (f", found {len(single)} of the last two: name one" if single else "")
    )


def released_config(directory: Path) -> dict[str, Any]:
    """config.json, with the stop ids of generation_config.json, which is the newer of the two."""
    config = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.exists():
        eos = read_json(generation).get("eos_token_id")
        config["eos_token_id"] = config.get("eos_token_id") if eos is None else eos
    return config


def stored_in_4_bits(reader: Reader) -> dict[str, list[str]]:
    """The weights that are already quantized, each with the names of all tensors that make it up."""
    weights = {name.split(".quant_state.")[0] for name in reader.shapes if ".quant_state." in name}
    parts: dict[str, list[str]] = {name: [] for name in weights}
    for name in reader.shapes:
        owner = name if name in weights else name.rpartition(".weight.")[0] + ".weight"
        if owner in parts:
            parts[owner].append(name)
    return parts


def record(reader: Reader, parts: list[str]) -> dict[str, Tensor]:
    """The tensors of a quantized weight, of which only the one that says how it is stored has been read."""
    nothing = torch.empty(0)
    return {part: reader.read(part) if ".quant_state." in part else nothing for part in parts}


def read_stored(
    name: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor], quant: QuantConfig | None
) -> QuantizedTensor:
    """A quantized weight as the checkpoint has it, of its tensors there."""
    q = nf4.from_state_dict(tensors, name)
    if q.shape != shape:
        raise ValueError(f"{name} is {list(q.shape)} in its 4-bit record but the config asks for {list(shape)}")
    if quant is not None and not same_format(quant, q.config):
        raise ValueError(f"{name} is already quantized, as {q.config}; load it without asking for {quant}")
    return q


def same_format(asked: QuantConfig, stored: QuantConfig) -> bool:
    """Do they agree in all that a file says? Of how scales were chosen it says nothing."""
    nested = asked.nested_block_size if asked.double_quant else stored.nested_block_size
    return replace(asked, scale=stored.scale, nested_block_size=nested) == stored


def check_dense(name: str, weight: Tensor) -> Tensor:
    """A weight that is not in 4 bits, if it consists of plain floating-point numbers."""
    if weight.dtype not in DENSE_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DENSE_DTYPES)
        raise ValueError(f"{name} is stored as {weight.dtype}; weights are {known}, or 4 bits with a quant_state")
    return weight


def check_names(expected: dict[str, tuple[int, ...]], reader: Reader, stored: dict[str, list[str]]) -> None:
    """Refuse a checkpoint that lacks tensors, has others, or has them in other shapes: all in one message."""
    parts = {part for group in stored.values() for part in group}
    missing = [name for name in expected if name not in reader.shapes]
    unexpected = [name for name in reader.shapes if name not in expected and name not in parts]
    misshapen = [
        f"{name} {list(reader.shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in reader.shapes and name not in stored and reader.shapes[name] != shape
    ]
    found = {"missing": missing, "unexpected": [f"{n} (in {reader.where(n)})" for n in unexpected]}
    found["of another shape"] = misshapen
    problems = [f"{len(names)} {what}: {shortened(names)}" for what, names in found.items() if names]
    if problems:
        some = next(iter(reader.shapes), None)
        where = reader.where(some) if some else "checkpoint"
        raise CheckpointError(f"{where}: does not fit its config. " + "; ".join(problems))


def shortened(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def refuse_non_finite(weight: Tensor, name: str, first_row: int = 0) -> None:
    """Refuse a weight, or its rows from `first_row` on, that does not consist of numbers."""
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        index = torch.nonzero(~finite)[0].tolist()
        index[0] += first_row
        raise ValueError(f"{name} holds NaN or infinity at {index} as {weight.dtype}")
