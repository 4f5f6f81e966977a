"""Meta's own layout: params.json beside consolidated.00.pth, consolidated.01.pth, ...

The weights were split for tensor parallelism, so a whole tensor is its parts side by side: by rows where a
layer's outputs were split, by columns where its inputs were. Norms are whole in every part. Query and key
rows are stored for rotary positions that turn neighbouring channels (0, 1), (2, 3), ...; here, as in the
released safetensors, channel c turns with c + C/2, so those rows are put in that order.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.config_fields import real, size
from models.errors import CheckpointError
from models.readers import Stored, TorchReader, read_json

# Their name, ours, and the dimension along which parts are joined (None: each part holds the whole).
NAMES = (
    (r"tok_embeddings\.weight", "model.embed_tokens.weight", 1),
    (r"norm\.weight", "model.norm.weight", None),
    (r"output\.weight", "lm_head.weight", 0),
    (r"layers\.(\d+)\.attention\.wq\.weight", r"model.layers.\1.self_attn.q_proj.weight", 0),
    (r"layers\.(\d+)\.attention\.wk\.weight", r"model.layers.\1.self_attn.k_proj.weight", 0),
    (r"layers\.(\d+)\.attention\.wv\.weight", r"model.layers.\1.self_attn.v_proj.weight", 0),
    (r"layers\.(\d+)\.attention\.wo\.weight", r"model.layers.\1.self_attn.o_proj.weight", 1),
    (r"layers\.(\d+)\.feed_forward\.w1\.weight", r"model.layers.\1.mlp.gate_proj.weight", 0),
    (r"layers\.(\d+)\.feed_forward\.w2\.weight", r"model.layers.\1.mlp.down_proj.weight", 1),
    (r"layers\.(\d+)\.feed_forward\.w3\.weight", r"model.layers.\1.mlp.up_proj.weight", 0),
    (r"layers\.(\d+)\.attention_norm\.weight", r"model.layers.\1.input_layernorm.weight", None),
    (r"layers\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight", None),
)
IGNORED = r"rope\.freqs"  # derived from the config


class MetaReader:
    """The parts of a consolidated checkpoint, joined tensor by tensor under the released names."""

    released_dtype: torch.dtype | None = None

    def __init__(self, paths: list[Path], heads: int, kv_heads: int, width: int) -> None:
        self.parts = [TorchReader(path) for path in paths]
        self.heads = {"q_proj": heads, "k_proj": kv_heads}
        first = self.parts[0]
        for part in self.parts[1:]:
            if part.shapes.keys() != first.shapes.keys():
                odd = sorted(part.shapes.keys() ^ first.shapes.keys())[0]
                raise CheckpointError(f"{part.path}: {odd} is in only one of {first.path.name} and this file")
        self.rows: dict[str, tuple[str, int | None]] = {}  # our name -> their name and the dimension
        for theirs, shape in first.shapes.items():
            if re.fullmatch(IGNORED, theirs):
                continue
            ours, dim = released_name(theirs)
            if theirs == "tok_embeddings.weight" and shape[-1:] == (width,):
                dim = 0  # vocabulary-parallel: rows are split, columns whole
            self.rows[ours] = (theirs, dim)
        self.shapes = {ours: self.joined_shape(*row) for ours, row in self.rows.items()}

    def read(self, name: str) -> Tensor:
        return self.read_rows(name, 0, self.shapes[name][0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        heads = self.heads.get(name.split(".")[-2])
        return rows_in_order(partial(self.stacked, name), self.shapes[name][0], heads, start, stop)

    def stacked(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the joined parts as the files have them."""
        theirs, dim = self.rows[name]
        if dim is None:
            return self.parts[0].read_rows(theirs, start, stop)
        if dim == 1:
            return torch.cat([part.read_rows(theirs, start, stop) for part in self.parts], dim=1)
        found, first = [], 0
        for part in self.parts:
            count = part.shapes[theirs][0]
            begin, end = (min(max(row - first, 0), count) for row in (start, stop))
            found.append(part.read_rows(theirs, begin, end))
            first += count
        return torch.cat(found)

    def stored(self, name: str) -> Stored:
        theirs, dim = self.rows[name]
        parts = [part.stored(theirs) for part in (self.parts if dim is not None else self.parts[:1])]
        return Stored(parts[0].kind, sum(part.nbytes for part in parts))

    def where(self, name: str) -> str:
        return str(self.parts[0].path)

    def joined_shape(self, theirs: str, dim: int | None) -> tuple[int, ...]:
        shapes = [part.shapes[theirs] for part in self.parts]
        joined = list(shapes[0])
        alike = {(*shape[:dim], *shape[dim + 1 :]) if dim is not None else shape for shape in shapes}
        if len(alike) > 1 or len(joined) <= (dim or 0):
            raise CheckpointError(f"{self.parts[0].path}: {theirs} is {', '.join(map(str, shapes))}; parts must fit")
        if dim is None:
            return shapes[0]
        joined[dim] = sum(shape[dim] for shape in shapes)
        return tuple(joined)


def open_meta(directory: Path) -> tuple[dict[str, Any], MetaReader]:
    """A config in released field names, and the reader of the parts. Sizes come from the tensors."""
    where = directory / "params.json"
    params = read_json(where)
    dim, heads, layers = (size(params.get(key), f"{where}: {key}") for key in ("dim", "n_heads", "n_layers"))
    kv_heads = size(params.get("n_kv_heads") or heads, f"{where}: n_kv_heads")
    if dim % heads:
        raise CheckpointError(f"{where}: dim {dim} does not split into {heads} heads")

    paths = consolidated_parts(directory)
    reader = MetaReader(paths, heads, kv_heads, dim)
    check_part_count(reader, dim, where)
    vocab_size = reader.shapes["model.embed_tokens.weight"][0]  # params.json of LLaMA 1 and 2 says -1
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": reader.shapes["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim // heads,
        "max_position_embeddings": params.get("max_seq_len", 2048),
        "rms_norm_eps": real(params.get("norm_eps"), f"{where}: norm_eps"),
        "rope_theta": params.get("rope_theta", 10000.0),
        "tie_word_embeddings": "lm_head.weight" not in reader.shapes,
    }
    if params.get("use_scaled_rope"):  # Llama 3.1 and later; their code fixes all but the factor
        config["rope_scaling"] = {"rope_type": "llama3", "factor": params.get("rope_scale_factor", 8.0)}
    if vocab_size < 100_000:
        config |= {"bos_token_id": 1, "eos_token_id": 2}  # sentencepiece's, in LLaMA 1 and 2
    else:
        config |= {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}  # Llama 3's
    return config, reader


def released_name(theirs: str) -> tuple[str, int | None]:
    """Our name and the dimension of parts; an unknown tensor keeps its name, to be reported by it."""
    for pattern, ours, dim in NAMES:
        match = re.fullmatch(pattern, theirs)
        if match is not None:
            return match.expand(ours), dim
    return theirs, None


def consolidated_parts(directory: Path) -> list[Path]:
    """All parts, in order; a gap in their numbers means that one is missing."""
    paths = sorted(directory.glob("consolidated.*.pth"))
    if not paths:
        raise CheckpointError(f"{directory}: params.json without any consolidated.NN.pth beside it")
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(paths))]
    if [path.name for path in paths] != expected:
        found = ", ".join(path.name for path in paths)
        raise CheckpointError(f"{directory}: has {found}; parts must be numbered from 00 without a gap")
    return paths


def check_part_count(reader: MetaReader, dim: int, where: Path) -> None:
    """The parts of the first layer must add up to the width that params.json gives."""
    for name in ("model.embed_tokens", "model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.o_proj"):
        if f"{name}.weight" not in reader.shapes:
            raise CheckpointError(f"{reader.parts[0].path}: has no tensor for {name}; is it Meta's layout?")
    found = reader.shapes["model.layers.0.self_attn.o_proj.weight"][1]
    if found != dim:
        parts = len(reader.parts)
        share = found / parts
        hint = f"; {dim / share:g} parts are needed" if share and dim % share == 0 else ""
        raise CheckpointError(
            f"{where.parent}: {parts} part(s) hold {found} of the {dim} columns that params.json gives{hint}"
        )


def half_rotation_order(rows: Tensor, heads: int) -> Tensor:
    """Rows (or biases) of a projection from interleaved to half-rotation order, head by head."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def rows_in_order(read: Callable[[int, int], Tensor], count: int, heads: int | None, start: int, stop: int) -> Tensor:
    """Rows of what `half_rotation_order` makes of the `count` rows that `read` gives; at most whole heads are read."""
    if heads is None or start >= stop:
        return read(start, stop)
    order = half_rotation_order(torch.arange(count), heads)[start:stop]
    first = int(order.min())
    return read(first, int(order.max()) + 1)[order - first]


def interleaved_order(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `half_rotation_order`."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
