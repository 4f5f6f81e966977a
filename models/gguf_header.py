"""The header of a GGUF file: metadata, and where each tensor's bytes lie.

The gguf package decodes the tensors and knows their types. Its reader also parses headers, but makes an array
of every string: four seconds for a vocabulary of fifty thousand, where the header is simple enough to be read
in a fraction of one: a magic, a version, two counts, keys with typed little-endian values, tensor records.
"""

import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from models.errors import CheckpointError

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4
DEEPEST_ARRAY = 4


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's place in the file; `shape` has the rows first, as torch has."""

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
        tensor = self.tensors[name]
        return self.decoded(name, tensor.shape, tensor.offset, tensor.nbytes)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor, decoded to float32; of a vector, whose numbers are in blocks, all are read."""
        tensor = self.tensors[name]
        if len(tensor.shape) < 2:
            return self.read(name)[start:stop]
        row_bytes = tensor.nbytes // max(tensor.shape[0], 1)
        shape = (stop - start, *tensor.shape[1:])
        return self.decoded(name, shape, tensor.offset + start * row_bytes, shape[0] * row_bytes)

    def decoded(self, name: str, shape: tuple[int, ...], offset: int, nbytes: int) -> Tensor:
        """What the bytes at a place in the file stand for, all or some rows of the tensor that is called `name`."""
        import gguf

        if prod(shape) == 0:
            return torch.empty(shape)
        raw = np.fromfile(self.path, dtype=np.uint8, count=nbytes, offset=offset)
        kind = self.tensors[name].kind
        try:
            values = gguf.dequantize(raw.reshape(*shape[:-1], -1), kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {kind.name}, which the gguf package cannot decode"
            ) from error
        return torch.from_numpy(np.array(values, dtype=np.float32)).view(shape)


def read_gguf_header(path: str | Path) -> GgufHeader:
    """Parse a file's header, or remember it; a file that changed is parsed again."""
    path = Path(path)
    try:
        stat = path.stat()
        return parse(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


@lru_cache(maxsize=2)
def parse(path: Path, size: int, changed: int) -> GgufHeader:
    with path.open("rb") as file:
        return Header(file, path).read()


class Header:
    """One pass over a header; every length is checked against the file's before it is believed."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size

    def read(self) -> GgufHeader:
        if self.take(4) != MAGIC:
            raise CheckpointError(f"{self.path}: not a GGUF file: it does not start with {MAGIC.decode()}")
        version = self.scalar("I")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path}: GGUF version {version} cannot be read; 2 and 3 can")
        tensor_count, pair_count = self.scalar("Q"), self.scalar("Q")
        self.fits(pair_count, 13)  # a key's length, a type and a byte
        metadata = {}
        for _ in range(pair_count):
            key = self.string()
            if key in metadata:
                raise CheckpointError(f"{self.path}: {key!r:.80} comes twice; the file is damaged")
            metadata[key] = self.value(self.scalar("I"))
        self.fits(tensor_count, 24)  # a name's length, dimensions, a type and an offset
        records = [self.tensor() for _ in range(tensor_count)]

        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= self.size:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}; the file is damaged")
        start = -(-self.file.tell() // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in records:
            if name in tensors:
                raise CheckpointError(f"{self.path}: tensor {name!r:.80} comes twice; the file is damaged")
            tensors[name] = self.placed(name, shape, kind, start + offset)
        ordered = sorted((t.offset, t.offset + t.nbytes, name) for name, t in tensors.items() if t.nbytes)
        for (_, end, before), (begin, _, name) in pairwise(ordered):
            if begin < end:  # few bytes under many names would unfold
                raise CheckpointError(f"{self.path}: {name} lies on {before}; the file is damaged")
        return GgufHeader(self.path, metadata, tensors)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.string(), self.scalar("I")
        if dimensions > MOST_DIMENSIONS:
            raise CheckpointError(f"{self.path}: {name} has {dimensions} dimensions; the file is damaged")
        # GGUF writes the fastest dimension first.
        shape = tuple(reversed([self.scalar("Q") for _ in range(dimensions)]))
        return name, shape, self.scalar("I"), self.scalar("Q")

    def placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        import gguf

        try:
            known = gguf.GGMLQuantizationType(kind)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: {name} has type {kind}, which the gguf package does not know; a newer one may"
            ) from error
        block, block_bytes = gguf.GGML_QUANT_SIZES[known]
        nbytes = prod(shape) // block * block_bytes
        if (shape and shape[-1] % block) or offset + nbytes > self.size:
            raise CheckpointError(f"{self.path}: ends before {name} does; fetch or copy it again")
        return GgufTensor(shape, known, offset, nbytes)

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(self.format(kind))
        item, count = self.scalar("I"), self.scalar("Q")
        if depth > DEEPEST_ARRAY:
            raise CheckpointError(f"{self.path}: arrays within arrays {depth} deep; the file is damaged")
        if item in (STRING, ARRAY):
            self.fits(count, 8)
            return [self.value(item, depth + 1) for _ in range(count)]
        letter = self.format(item)
        self.fits(count, struct.calcsize(letter))
        return list(struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(letter))))

    def format(self, kind: int) -> str:
        if kind not in SCALARS:
            raise CheckpointError(f"{self.path}: GGUF value type {kind} is unknown; the file is damaged")
        return SCALARS[kind]

    def scalar(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(letter)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def take(self, count: int) -> bytes:
        self.fits(count, 1)  # a damaged length must not reserve memory
        data = self.file.read(count)
        if len(data) < count:
            raise CheckpointError(f"{self.path}: the GGUF header ends early; the file is truncated")
        return data

    def fits(self, count: int, width: int) -> None:
        if count * width > self.size:
            raise CheckpointError(
                f"{self.path}: a GGUF length of {count} exceeds the file's {self.size} bytes; "
                "the file is truncated or damaged"
            )
