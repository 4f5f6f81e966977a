"""Tensors of a checkpoint, one at a time, whatever file they lie in.

A reader knows every tensor's name and shape before it reads any, and each read opens the file, takes one
tensor and lets go: pages of a file that stays mapped would count as this process's memory, and the whole
point of streaming is that only the quantized model grows. Nothing here runs code from a file.
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.errors import CheckpointError

MOST_COPIES = 8  # tied embeddings stand under several names with one storage
LARGEST_JSON = 256 * 2**20


class Stored(NamedTuple):
    """How a file holds a tensor."""

    kind: str
    """Its type: torch's name of a dtype (bfloat16), or GGUF's of a format (Q4_K)."""
    nbytes: int


@runtime_checkable
class Reader(Protocol):
    """Names, shapes and single tensors of a checkpoint."""

    shapes: dict[str, tuple[int, ...]]
    released_dtype: torch.dtype | None
    """The precision of the weights that the file was made from, where it does not keep them as they were;
    4-bit codes are then chosen for the weights in that precision. None: the file has the weights."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor, on the CPU; no more than these are read, or little more."""
        ...

    def stored(self, name: str) -> Stored:
        """How the file holds a tensor, which takes no reading of it."""
        ...

    def where(self, name: str) -> str:
        """The file that holds a tensor, for error messages."""
        ...


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsReader:
    """One *.safetensors file."""

    released_dtype: torch.dtype | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.opened() as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            self.shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
            self.types = {name: piece.get_dtype() for name, piece in slices.items()}
            self.metadata: dict[str, str] = f.metadata() or {}

    def read(self, name: str) -> Tensor:
        with self.opened() as f:
            return f.get_tensor(name).clone()  # not a view of the file, which may change or vanish

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        with self.opened() as f:
            return f.get_slice(name)[start:stop].clone()

    def stored(self, name: str) -> Stored:
        dtype = SAFETENSORS_DTYPES.get(self.types[name])
        if dtype is None:
            raise CheckpointError(f"{self.path}: {name} is of type {self.types[name]}, which is not known here")
        return Stored(dtype_name(dtype), prod(self.shapes[name]) * dtype.itemsize)

    def where(self, name: str) -> str:
        return str(self.path)

    @contextmanager
    def opened(self) -> Iterator[Any]:
        regular_file(self.path)
        try:
            with safe_open(self.path, framework="pt") as f:
                yield f
        except (SafetensorError, OSError, RuntimeError, ValueError, AttributeError) as error:
            # torch and the library each complain in their own way of a type or a shape that does not exist
            raise CheckpointError(
                f"{self.path}: not a whole safetensors file ({first_line(error)}); fetch or copy it again"
            ) from error


class TorchReader:
    """One file written by torch.save: *.bin, *.pth or *.pt, holding a flat dictionary of tensors."""

    released_dtype: torch.dtype | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: dict[str, Tensor] | None = None
        state = self.load()
        if not is_mapped(path):
            self.kept = state  # the format before torch 1.6 cannot be mapped: it is read once, whole
        self.shapes = {name: tuple(value.shape) for name, value in state.items()}
        self.dtypes = {name: value.dtype for name, value in state.items()}

    def read(self, name: str) -> Tensor:
        return self.tensor(name).clone()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensor(name)[start:stop].clone()

    def tensor(self, name: str) -> Tensor:
        """One tensor, which is read from the file where it is used."""
        state = self.load() if self.kept is None else self.kept
        return state[name].detach()

    def stored(self, name: str) -> Stored:
        dtype = self.dtypes[name]
        return Stored(dtype_name(dtype), prod(self.shapes[name]) * dtype.itemsize)

    def where(self, name: str) -> str:
        return str(self.path)

    def load(self) -> dict[str, Tensor]:
        state = load_torch(self.path)
        if not isinstance(state, dict):
            raise CheckpointError(f"{self.path}: holds a {type(state).__name__}, not names and tensors")
        check_tensors(state, self.path)
        return state


def load_torch(path: Path) -> Any:
    """What torch.save wrote, mapped where the format allows; never by running code."""
    mapped = is_mapped(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, because reading it would run code or it is broken "
            f"({first_line(error)}); use a safetensors copy"
        ) from error
    except Exception as error:  # a broken pickle can make torch fail in any way; what it said is passed on
        raise CheckpointError(
            f"{path}: not a whole torch file ({first_line(error)}); fetch or copy it again"
        ) from error


def is_mapped(path: Path) -> bool:
    """Is it in the format of torch 1.6 and later, a zip, of which single tensors can be read?

    Older files are read whole. A zip that would unpack to more than it is, is refused.
    """
    regular_file(path)
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path}: not a whole torch file ({first_line(error)}); fetch or copy it again"
        ) from error
    if unpacked > path.stat().st_size:
        raise CheckpointError(f"{path}: claims to unpack to {unpacked} bytes; torch does not compress, so it is broken")
    return True


def check_tensors(state: dict[Any, Any], path: Path) -> None:
    """Refuse entries of a torch file that are not plain tensors under names, or more than the file can hold."""
    for name, value in state.items():
        problem = "is not a tensor under a name" if not isinstance(name, str) else unusual(value)
        if problem:
            raise CheckpointError(f"{path}: {name!r:.80} {problem}; a checkpoint maps names to tensors")
    total, size = sum(value.nbytes for value in state.values()), path.stat().st_size
    if total > MOST_COPIES * size:
        raise CheckpointError(f"{path}: holds {len(state)} tensors of {total} bytes in {size}; it is broken")


def unusual(value: Any) -> str | None:
    """What is wrong with an entry of a torch file, if it is not a plain tensor of its own size."""
    if not isinstance(value, Tensor):
        return f"is not a tensor but a {type(value).__name__}"
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return f"is a tensor of an unusual kind ({value.layout}, {value.device.type}, {value.dtype})"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"claims {list(value.shape)} numbers but brings fewer"  # rows that share memory would unfold
    return None


class ShardedReader:
    """Several files that together hold one checkpoint, each tensor whole in one of them."""

    released_dtype: torch.dtype | None = None

    def __init__(self, readers: list[Reader]) -> None:
        self.owner: dict[str, Reader] = {}
        for reader in readers:
            for name in reader.shapes:
                if name in self.owner:
                    raise CheckpointError(
                        f"{reader.where(name)}: {name} is also in {self.owner[name].where(name)}; keep one"
                    )
                self.owner[name] = reader
        self.shapes = {name: reader.shapes[name] for name, reader in self.owner.items()}

    def read(self, name: str) -> Tensor:
        return self.owner[name].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.owner[name].read_rows(name, start, stop)

    def stored(self, name: str) -> Stored:
        return self.owner[name].stored(name)

    def where(self, name: str) -> str:
        return self.owner[name].where(name)


class RenamedReader:
    """Another reader's tensors under the names of a model's parameters.

    `rename` gives the parameter that a tensor is for, or None for one to leave out. The parts of a 4-bit weight, as
    `P.absmax`, go with their P. Of several tensors for one parameter, which must be copies of each other, the one
    that has its name is read.
    """

    def __init__(self, reader: Reader, rename: Callable[[str], str | None]) -> None:
        self.reader = reader
        self.released_dtype = reader.released_dtype
        self.theirs: dict[str, str] = {}
        self.copies: dict[str, list[str]] = {}  # all tensors for a parameter, the one that is read among them
        for name in reader.shapes:
            owner, dot, part = name.partition(".weight.")
            ours = rename(owner + ".weight" if dot else name)
            if ours is None:
                continue
            ours += f".{part}" if dot else ""
            self.copies.setdefault(ours, []).append(name)
            other = self.theirs.get(ours, name)
            if reader.shapes[other] != reader.shapes[name]:
                raise CheckpointError(
                    f"{reader.where(name)}: {name} is {list(reader.shapes[name])} but its copy {other} "
                    f"{list(reader.shapes[other])}"
                )
            self.theirs[ours] = name if name == ours else other
        self.shapes = {ours: reader.shapes[name] for ours, name in self.theirs.items()}

    def read(self, name: str) -> Tensor:
        return self.compared(name, self.reader.read)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.compared(name, lambda theirs: self.reader.read_rows(theirs, start, stop))

    def compared(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """What is read of the tensor for a parameter, after its copies were found to be such."""
        value = read(self.theirs[name])
        for copy in self.copies[name]:
            if copy != self.theirs[name] and not torch.equal(read(copy), value):
                raise CheckpointError(
                    f"{self.reader.where(copy)}: {copy} is not a copy of {self.theirs[name]}, though its config "
                    "means them to be one; untied weights of this kind are not supported"
                )
        return value

    def stored(self, name: str) -> Stored:
        return self.reader.stored(self.theirs[name])

    def where(self, name: str) -> str:
        return self.reader.where(self.theirs[name])


def open_files(directory: Path) -> Reader:
    """The weights of a directory in the released layout: safetensors before .bin, an index before a file."""
    for single, make in (("model.safetensors", SafetensorsReader), ("pytorch_model.bin", TorchReader)):
        index = directory / f"{single}.index.json"
        if index.is_file():
            return indexed(index, make)
        if (directory / single).is_file():
            return make(directory / single)
    shards = sorted(directory.glob("model-*-of-*.safetensors"))
    if shards:
        raise CheckpointError(
            f"{directory}: has {len(shards)} shards but no model.safetensors.index.json to say what they hold"
        )
    raise CheckpointError(
        f"{directory}: no weights; looked for model.safetensors and pytorch_model.bin, whole or with an index"
    )


def indexed(index: Path, make: type[SafetensorsReader] | type[TorchReader]) -> Reader:
    """The shards that an index names; each must be there and hold what the index says."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor names to files")
    names = sorted(set(table.values()))
    outside = [
        name
        for name in names
        if not name or Path(name).name != name or name == ".." or len(name.encode(errors="replace")) > 255
    ]
    if outside:
        raise CheckpointError(f"{index}: names {outside[0]!r:.80}, which is not a file beside it")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index}: names {len(absent)} of {len(names)} files that are not there: {', '.join(absent)}; "
            "the download may not have finished"
        )
    sharded = ShardedReader([make(index.parent / name) for name in names])
    lost = [name for name, file in table.items() if Path(sharded_where(sharded, name)).name != file]
    if lost:
        raise CheckpointError(f"{index}: says that {table[lost[0]]} holds {lost[0]}, but it does not")
    return sharded


def sharded_where(reader: ShardedReader, name: str) -> str:
    return reader.where(name) if name in reader.owner else ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or the reason why there is none."""
    regular_file(path)
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, more than any such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; a JSON object is needed")
    return value


def regular_file(path: Path) -> None:
    """Refuse what is missing, and what a read would wait on for ever, as a pipe."""
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
