"""Adapters on disk, in PEFT's layout: adapter_model.safetensors and adapter_config.json.

PEFT writes the dotted name of a layer behind `base_model.model.`; its reader and ours take each other's
files. An adapter is written aside, read back and compared before it gets its name, because an adapter file
that turns out empty is found out when the training is long over. One that is read is compared with the model, name by
name and shape by shape, and searched for NaN, before the model is touched.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.attachment import attached, refuse_second
from models.errors import CheckpointError
from models.loralib import loralib_file, read_loralib
from models.methods import AdapterConfig, adapter_shapes, prepare
from models.parallel import shares
from models.peft_methods import peft_config, read_peft_config
from models.peft_names import file_name, released_name
from models.readers import Reader, RenamedReader, SafetensorsReader, TorchReader
from models.tied_head import refuse_untied, tied_heads, with_tied_heads
from models.whole import trained_parameter

FILES = (("adapter_model.safetensors", SafetensorsReader), ("adapter_model.bin", TorchReader))


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write the adapters, then read them back and compare every number.

    Adapters with NaN or infinity are refused: whoever finds them later has lost the training that made them.
    """
    trained = with_tied_heads(model, adapter_tensors(model))
    tensors = {file_name(name): t.cpu().contiguous() for name, t in trained.items()}
    if not tensors:
        raise ValueError("the model has no adapters; attach makes them")
    broken = [name for name, t in tensors.items() if not bool(t.isfinite().all())]
    if broken:
        raise ValueError(
            f"{directory}: not saved: {len(broken)} of {len(tensors)} tensors hold NaN or infinity, {broken[0]} first; "
            "go back to an earlier checkpoint"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / ".adapter_model.safetensors.partial"
    save_file(tensors, partial, {"format": "pt"})
    verify(partial, tensors)
    config = directory / ".adapter_config.json.partial"
    config.write_text(json.dumps(peft_config(model), indent=2) + "\n", encoding="utf-8")
    shutil.copymode(config, partial)  # safetensors makes files that only their owner reads
    for path, name in ((partial, "adapter_model.safetensors"), (config, "adapter_config.json")):
        with path.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(path, directory / name)


def load_adapter(model: nn.Module, path: str | Path, *, alpha: float | None = None) -> None:
    """Attach the adapters of a directory to a model that has none.

    Or those of one file that microsoft/LoRA's examples saved, or of a directory that holds only such a file. It does
    not say its alpha, which is taken for 16, as in their GLUE runs, unless told.
    """
    prepare_adapter(model, path, alpha=alpha)()


def prepare_adapter(model: nn.Module, path: str | Path, *, alpha: float | None = None) -> Callable[[], None]:
    """Do as `load_adapter` does but leave the adapters without values, and give what fills them."""
    refuse_second(model)
    path = Path(path)
    old = loralib_file(path)
    if old is not None:
        reader, config = read_loralib(old, model, alpha)
    elif alpha is not None:
        raise ValueError(f"{path}: alpha={alpha} was given, but the adapter's own configuration says what it is")
    else:
        reader, config = read_peft(path, model)

    check(model, config, reader, path)
    with unfitting(path):
        start = prepare(model, config)

    def fill() -> None:
        with unfitting(path):
            start()
        for name, tensor in adapter_tensors(model).items():
            shares.read(tensor, reader, name)

    return fill


@contextmanager
def unfitting(path: Path) -> Iterator[None]:
    """Around what attaches the adapters of a path: what is wrong with them is the file's fault."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: does not fit this model ({error})") from error


def read_peft(directory: Path, model: nn.Module) -> tuple[Reader, AdapterConfig]:
    """The tensors of an adapter under the names of the model's parameters, and its configuration."""
    if not (directory / "adapter_config.json").exists():
        raise CheckpointError(f"{directory}: no adapter_config.json; is it an adapter's directory?")
    found = [(directory / name, make) for name, make in FILES if (directory / name).exists()]
    if not found:
        raise CheckpointError(f"{directory}: has no {' and no '.join(name for name, _ in FILES)}")
    file, make = found[0]
    reader = RenamedReader(make(file), released_name)
    refuse_untied(reader, model)
    heads = tied_heads(model, reader.shapes)
    reader = RenamedReader(reader, lambda name: heads.get(name, name))
    return reader, read_peft_config(directory / "adapter_config.json", model, reader.shapes)


def check(model: nn.Module, config: AdapterConfig, reader: Reader, path: Path) -> None:
    """Refuse tensors that are not exactly those of this configuration on this model, or not all numbers."""
    try:
        expected = adapter_shapes(model, config)
    except ValueError as error:
        raise CheckpointError(f"{path}: does not fit this model ({error})") from error
    problems = [f"lacks {n}" for n in expected if n not in reader.shapes]
    problems += [f"has {n}, which this model has no place for" for n in reader.shapes if n not in expected]
    problems += [
        f"{n} is {list(reader.shapes[n])}, expected {list(shape)}"
        for n, shape in expected.items()
        if n in reader.shapes and reader.shapes[n] != shape
    ]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(f"{path}: the adapter is for another model: {shown}")
    for name in expected:
        tensor = reader.read(name)
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            what = "NaN or infinity" if tensor.is_floating_point() else f"{tensor.dtype}, not floating-point numbers"
            raise CheckpointError(f"{reader.where(name)}: {name} holds {what}; the training that made it failed")


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What was attached to be trained, and the modules that are trained whole, by dotted name."""
    attachment = attached(model)
    return {name: trained_parameter(model, name).detach() for name in attachment.names} if attachment else {}


def verify(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise unless the file holds exactly these tensors, and no fewer bytes than they have."""
    reader = SafetensorsReader(path)
    wrong = [n for n, t in tensors.items() if n not in reader.shapes or not torch.equal(reader.read(n), t)]
    if wrong or len(reader.shapes) != len(tensors):
        raise RuntimeError(f"{path}: {wrong or 'tensor count'} differs after writing; the disk may be failing")
    least, size = sum(t.nbytes for t in tensors.values()), path.stat().st_size
    if size < least:
        raise RuntimeError(f"{path}: has {size} bytes after writing {least}; the disk may be failing")
