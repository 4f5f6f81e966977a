"""The header of a GGUF file: metadata, and where each tensor's bytes lie.

The gguf package parses it, which takes seconds where a tokenizer of fifty thousand pieces is inside; so what
is needed is kept in plain Python and shared by those who ask for the same file (model and tokenizer).
"""

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import CheckpointError
from models.readers import first_line


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's place in the file; `shape` has the rows first, as torch has."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key, and tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def read(self, name: str) -> Tensor:
        """One tensor, decoded to float32."""
        import gguf

        tensor = self.tensors[name]
        raw = np.fromfile(self.path, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
        rows = raw.reshape(*tensor.shape[:-1], -1)
        try:
            values = gguf.dequantize(rows, tensor.kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {tensor.kind.name}, which the gguf package cannot decode"
            ) from error
        return torch.from_numpy(np.array(values, dtype=np.float32)).view(tensor.shape)


def read_gguf_header(path: str | Path) -> GgufHeader:
    """Parse a file's header, or remember it; a file that changed is parsed again."""
    path = Path(path)
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({first_line(error)})") from error
    return parse(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2)
def parse(path: Path, size: int, changed: int) -> GgufHeader:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: contents(field) for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, OSError, MemoryError, struct.error) as error:
        raise CheckpointError(f"{path}: not a whole GGUF file ({first_line(error)})") from error
    tensors = {
        t.name: GgufTensor(
            t.name,
            tuple(int(n) for n in reversed(t.shape)),  # GGUF writes the fastest dimension first
            t.tensor_type,
            int(t.data_offset),
            int(t.n_bytes),
        )
        for t in reader.tensors
    }
    for tensor in tensors.values():
        if tensor.offset + tensor.nbytes > size:
            raise CheckpointError(f"{path}: ends before {tensor.name} does; fetch or copy it again")
    return GgufHeader(path, metadata, tensors)


def contents(field: Any) -> Any:
    """A metadata value. Long lists of strings are taken from the bytes directly: the package's own way
    slices a memory map three times for each, which is seconds for a vocabulary."""
    import gguf

    if field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]:
        return [field.parts[i].tobytes().decode("utf-8") for i in field.data]
    if len(field.types) == 2:  # an array of numbers
        return [field.parts[i].item() for i in field.data]
    return field.contents()
