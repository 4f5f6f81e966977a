"""A stored weight as named tensors: those bitsandbytes saves, under its names, byte for byte.

For a weight called P, of n elements in num_blocks blocks:

    P                     uint8 (bytes, 1)    packed codes
    P.absmax              float32 (num_blocks,), or uint8 codes of it with double quantization
    P.quant_map           float32 (levels,)   the codebook
    P.nested_absmax       float32 (num_nested_blocks,)      with double quantization
    P.nested_quant_map    float32 (256,)                    with double quantization
    P.quant_state.bitsandbytes__nf4           the rest as JSON in bytes: block sizes, dtype, shape, offset

The last name tells the data type: `bitsandbytes__nf4` and `bitsandbytes__fp4` are bitsandbytes' own, and
the other codebooks, which it does not know, are called by their plain name (`P.quant_state.int4`) so that
no file claims what it is not. How a scale was chosen is not stored: a searched weight reads back as one
with `scale="absmax"`.

Files come from strangers. Whatever does not fit together is refused, with the key that does not.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from jaxtyping import UInt8
from torch import Tensor

from nf4.blockwise import INPUT_DTYPES, QuantizedTensor
from nf4.codebook import CODEBOOKS, code_bits, codebook
from nf4.config import QuantConfig
from nf4.dynamic import dynamic_map
from nf4.packing import largest_code

BITSANDBYTES = ("nf4", "fp4")
STATE_NAMES = {f"bitsandbytes__{name}" if name in BITSANDBYTES else name: name for name in CODEBOOKS}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in INPUT_DTYPES}
PLAIN_FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
NESTED_FIELDS = {"nested_blocksize", "nested_dtype", "nested_offset"}
MAX_STATE_BYTES = 4096  # a state has about 170 bytes
MAX_INT = 2**63 - 1


def to_state_dict(q: QuantizedTensor, prefix: str) -> dict[str, Tensor]:
    """The tensors that stand for q in a file; none shares memory with another, but some with q."""
    name = q.config.codebook
    state = {
        "quant_type": name,
        "blocksize": q.config.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    tensors = {prefix: q.packed.detach().view(-1, 1)}
    if q.absmax is not None:
        tensors[f"{prefix}.absmax"] = q.absmax.detach()
    else:
        assert q.absmax_codes is not None
        assert q.nested_absmax is not None
        assert q.absmax_offset is not None
        state |= {
            "nested_blocksize": q.config.nested_block_size,
            "nested_dtype": "float32",
            "nested_offset": q.absmax_offset.item(),
        }
        tensors[f"{prefix}.absmax"] = q.absmax_codes.detach()
        tensors[f"{prefix}.nested_absmax"] = q.nested_absmax.detach()
        tensors[f"{prefix}.nested_quant_map"] = dynamic_map(signed=True).to(q.device)
    tensors[f"{prefix}.quant_map"] = codebook(name).to(q.device)
    key = next(key for key, codebook_name in STATE_NAMES.items() if codebook_name == name)
    blob = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"{prefix}.quant_state.{key}"] = blob.to(q.device)
    return tensors


def from_state_dict(tensors: Mapping[str, Tensor], prefix: str) -> QuantizedTensor:
    """The weight called `prefix` among `tensors`; its codes and scales are views of them, not copies.

    Codes may be stored under another dtype (bfloat16, float16 or float32), which is but a view of their
    bytes.
    """
    key, name, state = read_state(tensors, prefix)
    config = read_config(tensors, prefix)
    dtype = DTYPES.get(state["dtype"]) if isinstance(state["dtype"], str) else None
    if dtype is None:
        refuse(key, f"dtype must be one of {', '.join(DTYPES)}, not {state['dtype']!r}")
    packed = read_packed(tensors, prefix)
    shape = read_shape(key, state["shape"], packed, code_bits(name))

    n = math.prod(shape)
    expected_bytes, num_blocks = -(-n * code_bits(name) // 8), -(-n // config.block_size)
    if len(packed) != expected_bytes:
        refuse(prefix, f"codes of a weight of shape {shape} are {expected_bytes} bytes, not {len(packed)}")
    check_codes(prefix, packed, n, name)
    check_table(tensors, f"{prefix}.quant_map", codebook(name))

    nested = f"{prefix}.nested_absmax" in tensors
    absmax = read(tensors, f"{prefix}.absmax", torch.uint8 if nested else torch.float32, num_blocks)
    if not nested:
        return QuantizedTensor(packed, absmax, None, None, None, shape, dtype, config)

    if state["nested_dtype"] != "float32":
        refuse(key, f"nested_dtype must be float32, not {state['nested_dtype']!r}")
    offset = state["nested_offset"]
    if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not abs(offset) < 3.4028235e38:
        refuse(key, f"nested_offset must be a finite number, not {offset!r}")
    nested_key = f"{prefix}.nested_absmax"
    nested_absmax = read(tensors, nested_key, torch.float32, -(-num_blocks // config.nested_block_size))
    check_table(tensors, f"{prefix}.nested_quant_map", dynamic_map(signed=True))
    q = QuantizedTensor(
        packed=packed,
        absmax=None,
        absmax_codes=absmax,
        nested_absmax=nested_absmax,
        absmax_offset=torch.tensor(float(offset), dtype=torch.float32, device=packed.device),
        shape=shape,
        dtype=dtype,
        config=config,
    )
    if not q.scales.isfinite().all():
        refuse(nested_key, "with nested_offset decodes to scales beyond float32")
    return q


def read_config(tensors: Mapping[str, Tensor], prefix: str) -> QuantConfig:
    """The format of the weight called `prefix`: its record says it, and of the other tensors no value is looked at."""
    key, name, state = read_state(tensors, prefix)
    block_size = whole(key, state, "blocksize")
    if f"{prefix}.nested_absmax" not in tensors:
        return QuantConfig(codebook=name, block_size=block_size, double_quant=False)
    return QuantConfig(name, block_size, True, whole(key, state, "nested_blocksize"))


def refuse(key: str, problem: str) -> NoReturn:
    raise ValueError(f"{key}: {problem}")


def read_state(tensors: Mapping[str, Tensor], prefix: str) -> tuple[str, str, dict[str, Any]]:
    """The key of the one state of this weight, the codebook it names, and its fields, all of them present."""
    start = f"{prefix}.quant_state."
    keys = sorted(key for key in tensors if key.startswith(start))
    if len(keys) != 1:
        refuse(prefix, f"one {start}<data type> tells how a weight is stored, but {keys or 'none'} came")
    key = keys[0]
    if key.removeprefix(start) not in STATE_NAMES:
        refuse(key, f"not a data type that can be read; those are {', '.join(STATE_NAMES)}")
    name = STATE_NAMES[key.removeprefix(start)]
    state = parse(key, tensors[key])

    nested = f"{prefix}.nested_absmax" in tensors
    fields = PLAIN_FIELDS | (NESTED_FIELDS if nested else set())
    if set(state) != fields:
        refuse(key, f"the fields must be {', '.join(sorted(fields))}, but {', '.join(sorted(state))} came")
    if state["quant_type"] != name:
        refuse(key, f"the key says {name} but quant_type says {state['quant_type']!r}")

    known = {"absmax", "quant_map"} | ({"nested_absmax", "nested_quant_map"} if nested else set())
    parts = {k.removeprefix(f"{prefix}.") for k in tensors if k.startswith(f"{prefix}.") and k != key}
    for part in sorted(parts ^ known):
        refuse(f"{prefix}.{part}", "missing" if part in known else "not a part of a stored weight")
    return key, name, state


def parse(key: str, blob: Tensor) -> dict[str, Any]:
    if blob.dtype != torch.uint8 or blob.ndim != 1 or len(blob) > MAX_STATE_BYTES:
        refuse(key, f"must be up to {MAX_STATE_BYTES} bytes of JSON, not {describe(blob)}")
    try:
        state = json.loads(bytes(blob.tolist()).decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        refuse(key, f"not the JSON that tells how a weight is stored ({error})")
    if not isinstance(state, dict):
        refuse(key, f"must be a JSON object, not {type(state).__name__}")
    return state


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a field comes twice")
    return dict(pairs)


def whole(key: str, state: dict[str, Any], field: str) -> int:
    value = state[field]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_INT:
        refuse(key, f"{field} must be a whole number of at least 1, not {shorten(value)}")
    return value


def read_packed(tensors: Mapping[str, Tensor], prefix: str) -> UInt8[Tensor, " bytes"]:
    if prefix not in tensors:
        refuse(prefix, "missing")
    packed = tensors[prefix].detach()
    stored_as = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
    column = packed.ndim == 1 or (packed.ndim == 2 and packed.shape[1] == 1)
    if packed.dtype not in stored_as or not column:
        refuse(prefix, f"codes are a column of bytes, or those seen as floats, not {describe(packed)}")
    return packed.contiguous().view(-1).view(torch.uint8)


def read_shape(key: str, shape: Any, packed: Tensor, bits: int) -> tuple[int, ...]:
    """The weight's shape; without one, a flat weight that fills every byte."""
    if shape is None:
        return (len(packed) * 8 // bits,)
    sizes_ok = isinstance(shape, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape
    )
    # The product without its zeros is what strides are made of, even in a tensor without elements.
    if not sizes_ok or len(shape) > 64 or math.prod(size or 1 for size in shape) > MAX_INT:
        refuse(key, f"shape must be a list of sizes that a tensor can have, not {shorten(shape)}")
    return tuple(shape)


def read(tensors: Mapping[str, Tensor], key: str, dtype: torch.dtype, length: int) -> Tensor:
    """A vector of the dtype and length that the state asks for, without NaN or infinity."""
    tensor = tensors[key].detach()
    if tensor.dtype != dtype or tensor.shape != (length,):
        refuse(key, f"must be {dtype} of shape ({length},), not {describe(tensor)}")
    if not tensor.isfinite().all():
        refuse(key, "holds NaN or infinity")
    return tensor.contiguous()


def check_table(tensors: Mapping[str, Tensor], key: str, table: Tensor) -> None:
    """The stored table must be the one that codes mean here: otherwise other weights are meant."""
    stored = tensors[key].detach()
    if stored.dtype != table.dtype or stored.shape != table.shape or not torch.equal(stored.cpu(), table):
        refuse(key, f"is not the table of this data type: {describe(stored)}")


def check_codes(key: str, packed: UInt8[Tensor, " bytes"], n: int, name: str) -> None:
    """Some types leave codes unused (int4 has 15 levels): none may come."""
    levels = len(codebook(name))
    largest = largest_code(packed, code_bits(name)) if n and levels < 2 ** code_bits(name) else 0
    if largest >= levels:
        refuse(key, f"holds the code {largest}, but {name} has {levels} levels")


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def shorten(value: Any) -> str:
    return re.sub(r"(?s)^(.{60}).+$", r"\1...", repr(value))
