"""`qlora inspect PATH`: what a checkpoint, an adapter or a run is, and what it holds.

Of a checkpoint only headers are read, and of its 4-bit weights the few bytes that tell their format; how far
those are from the weights that they stand for is not known without the original. Of an adapter every layer is
read, for its norms.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from models.adapter_norms import SavedAdapter, is_adapter, read_adapter
from models.checkpoint import Source, matched, open_checkpoint, skeleton
from models.errors import CheckpointError
from models.inspection_tables import show
from models.precision import parts_on_disk, statement, stored_format
from models.target import read_run

if TYPE_CHECKING:
    from rich.console import Console

SIZES = (  # fields of a config.json that tell how large a model is, by the names of all architectures
    "num_hidden_layers",
    "num_layers",
    "num_decoder_layers",
    "hidden_size",
    "d_model",
    "intermediate_size",
    "d_ff",
    "num_attention_heads",
    "num_heads",
    "num_key_value_heads",
    "head_dim",
    "d_kv",
    "vocab_size",
    "max_position_embeddings",
    "num_labels",
)


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Say what a path holds."""

    path: Positional[str]
    """A checkpoint (directory or file), an adapter or a run."""
    tensors: bool = False
    """List every tensor of a checkpoint, with its shape and type."""
    json: bool = False
    """Print one JSON object on stdout."""


def command(options: InspectOptions, console: "Console") -> dict[str, Any]:
    path = Path(options.path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if (path / "config.toml").exists():
        result = run_summary(path)
    elif is_adapter(path):
        result = adapter_summary(read_adapter(path))
    else:
        result = checkpoint_summary(path, options.tensors)
    show(result, console)
    return result


def checkpoint_summary(path: Path, tensors: bool = False) -> dict[str, Any]:
    """Layout, architecture, sizes and parts of a checkpoint; one that would not load is refused as `load` does."""
    raw, reader, where = open_checkpoint(path)
    model = skeleton(raw, where, reader)
    source = matched(model, reader)
    parts = parts_on_disk(model, source)
    config = model.config.to_dict()
    files = {name: source.reader.where(name) for name in source.reader.shapes}
    kinds = Counter(source.reader.stored(name).kind for name in source.reader.shapes)
    summary = {
        "kind": "checkpoint",
        "path": str(path),
        "layout": layout(where, set(files.values())),
        "architecture": config["architectures"][0] if config.get("architectures") else type(model).__name__,
        "task": model.task_type,
        "sizes": {name: config[name] for name in SIZES if config.get(name) is not None},
        "parameters": parts.parameters,
        "bytes": parts.nbytes,
        "bits_per_weight": 8 * parts.nbytes / parts.parameters,
        "parts": [{**asdict(part), "bits_per_weight": part.bits_per_weight} for part in parts],
        "types": dict(kinds.most_common()),
        "quantization": formats(source),
        "fresh": sorted(source.fresh),
        "precision": statement(parts),
    }
    if tensors:
        shapes = source.reader.shapes
        summary["tensors"] = {n: {"shape": list(shapes[n]), "type": source.reader.stored(n).kind} for n in shapes}
    return summary


def formats(source: Source) -> list[dict[str, Any]]:
    """Each format that weights are stored in, and how many are."""
    found: Counter[tuple[Any, ...]] = Counter()
    for name in source.stored:
        codebook, state = stored_format(name, source)
        found[codebook, state["blocksize"], "nested_offset" in state, state.get("nested_blocksize")] += 1
    keys = ("codebook", "block_size", "double_quant", "nested_block_size")
    return [{**dict(zip(keys, values, strict=True)), "layers": count, "error": None} for values, count in found.items()]


def layout(where: str, files: set[str]) -> str:
    """What kind of checkpoint it is, from the file that gave the config and those that hold tensors."""
    if where.endswith("params.json"):
        return "Meta's consolidated parts"
    if where.endswith(".gguf"):
        return "GGUF"
    suffixes = " and ".join(sorted({Path(file).suffix for file in files}))
    if not where.endswith("config.json"):
        return f"{suffixes} file with weights and settings"
    return f"released names ({suffixes}{f', {len(files)} files' if len(files) > 1 else ''})"


def adapter_summary(adapter: SavedAdapter) -> dict[str, Any]:
    """Form, settings and norms of a saved adapter."""
    settings = adapter.settings
    ranks = sorted({layer.rank for layer in adapter.layers})
    return {
        "kind": "adapter",
        "path": adapter.file,
        "layout": adapter.form,
        "parameters": adapter.parameters,
        "bytes": sum(adapter.nbytes.values()),
        "types": adapter.nbytes,
        "ranks": ranks,
        "alpha": None if settings is None else settings.alpha,
        "settings": None if settings is None else asdict(settings),
        "targets": sorted({layer.name.rpartition(".")[2] for layer in adapter.layers}),
        "others": {name: list(shape) for name, shape in adapter.whole.items()},
        "layers": [asdict(layer) for layer in adapter.layers],
        "method": adapter.method,
        "vectors": [asdict(vector) for vector in adapter.vectors],
    }


def run_summary(path: Path) -> dict[str, Any]:
    """Base, progress and result of a run."""
    config = read_run(path / "config.toml")
    status = path / "STATUS"
    lines = metrics(path / "metrics.jsonl")
    trained = [line for line in lines if line.get("split") == "train"]
    measured = [line for line in lines if line.get("split") == "eval"]
    adapter, model = path / "adapter", path / "model"
    return {
        "kind": "run",
        "path": str(path),
        "base": config["model"],
        "base_is_there": Path(config["model"]).exists(),
        "quant": config.get("quant") if config.get("quantize", True) else None,
        "status": status.read_text(encoding="utf-8").strip() if status.exists() else None,
        "steps": trained[-1]["step"] if trained else 0,
        "loss": trained[-1].get("loss") if trained else None,
        "held_out_loss": measured[-1].get("loss") if measured else None,
        "task": config.get("task"),
        "adapters": config.get("adapters", True),
        "adapter": adapter_summary(read_adapter(adapter)) if is_adapter(adapter) else None,
        "model": checkpoint_summary(model) if (model / "config.json").exists() else None,
    }


def metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that a killed run left unfinished is passed over."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for i, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if i < len(lines) - 1:
                raise CheckpointError(f"{path}:{i + 1}: is damaged ({error})") from error
    return found
