"""What training has made of a model: written to a directory, and put back into a model that is as it was then.

Of adapters it is their files, of full fine-tuning a checkpoint. For going on with the training that holds the float32
weights as they are (`save_trained`, `restore_trained`); for use it holds them in the dtype that the model computes in
(`save_model`). Everything is read back after it was written, because what turns out empty is found out when the
training is long over.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from models.adapter import save_adapter
from models.attachment import attached
from models.errors import CheckpointError
from models.model import Model
from models.parallel import shares
from models.parallel.agreement import agreed
from models.peft_names import released_name
from models.readers import Reader, RenamedReader, SafetensorsReader, open_files
from models.tied_head import tied_heads
from models.whole import computed_parameters, trained_parameters
from models.writer import CheckpointWriter, save


def save_trained(model: Model, directory: str | Path) -> None:
    """Write what is trained, exactly: adapters as `save_adapter` does, else a checkpoint in the dtype of training.

    What holds NaN or infinity is refused.
    """
    if attached(model) is not None:
        save_adapter(model, directory)
        return
    parameters = {name: parameter.detach() for name, parameter in trained_parameters(model).items()}
    if not parameters:
        raise ValueError("nothing in the model is trained; attach or train_every_weight makes it so")
    refuse_non_finite(parameters.items(), directory)
    dtypes = sorted({str(parameter.dtype) for parameter in parameters.values()})
    with CheckpointWriter(directory) as writer:
        for name, parameter in parameters.items():
            writer.add(name, parameter)
        writer.finish(model.config.to_dict(), dtypes[0])
    verify(directory, parameters.items())


def save_model(model: Model, directory: str | Path) -> None:
    """Write the whole model in the dtype that it computes in, for use."""
    refuse_non_finite(computed_parameters(model), directory)
    save(model, directory)
    verify(directory, computed_parameters(model))


@torch.no_grad()
def restore_trained(model: Model, directory: str | Path) -> None:
    """Put what `save_trained` wrote into a model that is prepared alike: with the same adapters, or all of it trained.

    Every name, shape, dtype and number is looked at before the model is touched.
    """
    directory = Path(directory)
    parameters = trained_parameters(model)
    reader = trained_reader(model, directory)
    problems = [f"lacks {name}" for name in parameters if name not in reader.shapes]
    problems += [f"has {name}, which is not trained here" for name in reader.shapes if name not in parameters]
    for name, parameter in parameters.items():
        found = (reader.shapes[name], reader.stored(name).kind) if name in reader.shapes else None
        wanted = (tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
        if found is not None and found != wanted:
            problems.append(f"{name} is {list(found[0])} in {found[1]}, expected {list(wanted[0])} in {wanted[1]}")
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise CheckpointError(f"{directory}: was saved of another training: {shown}")
    # Shares are looked at, each by its process, and then read; whole weights are read again, for they may be large.
    with agreed(shares.any_shared(model)):
        for name, parameter in parameters.items():
            found = torch.empty_like(parameter)
            shares.read(found, reader, name)
            if not bool(shares.local(found).isfinite().all()):
                where = reader.where(name)
                raise CheckpointError(f"{where}: {name} holds NaN or infinity; the training that made it failed")
    for name, parameter in parameters.items():
        shares.read(parameter, reader, name)


def trained_reader(model: Model, directory: Path) -> Reader:
    """The tensors of a directory under the names of the model's parameters."""
    if attached(model) is None:
        return open_files(directory)
    reader = RenamedReader(SafetensorsReader(directory / "adapter_model.safetensors"), released_name)
    heads = tied_heads(model, reader.shapes)
    return RenamedReader(reader, lambda name: heads.get(name, name))


def refuse_non_finite(tensors: Iterable[tuple[str, Tensor]], directory: str | Path) -> None:
    broken = [name for name, tensor in tensors if not bool(tensor.isfinite().all())]
    if broken:
        raise ValueError(
            f"{directory}: not saved: {len(broken)} tensors hold NaN or infinity, {broken[0]} first; "
            "go back to an earlier checkpoint"
        )


def verify(directory: str | Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise unless the checkpoint holds exactly these tensors."""
    reader, count = open_files(Path(directory)), 0
    for name, tensor in tensors:
        count += 1
        if name not in reader.shapes or not torch.equal(reader.read(name), tensor.cpu()):
            raise RuntimeError(f"{directory}: {name} differs after writing; the disk may be failing")
    if len(reader.shapes) != count:
        raise RuntimeError(f"{directory}: holds {len(reader.shapes)} tensors after writing {count}")
