"""A LLaMA as one GGUF file: base and adapter merged, with the tokenizer, for llama.cpp and what is built on it.

The file is written aside (`models/gguf_writer.py`), read back and compared (`models/gguf_check.py`), and only then
gets its name: a model that answers differently after conversion is the commonest complaint about such files.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.attachment import adapted_layers
from models.checkpoint import open_checkpoint, skeleton
from models.device import pick_device, pick_dtype
from models.errors import ConfigError
from models.gguf_check import check
from models.gguf_writer import FILE_TYPES, shapes, stored_as, write_gguf
from models.llama import causal
from models.methods import refuse_unmergeable
from models.nf4_export import stored_dtype
from models.target import LoadOptions, Target, load_parts
from models.tokenizer import load_tokenizer


def export_gguf(target: Target, out: Path, options: LoadOptions, kind: str = "f16") -> dict[str, Any]:
    """Write the file `out` and compare it with the model that it was made from."""
    if kind not in FILE_TYPES:
        raise ConfigError(f"export: gguf_type {kind!r} is not known; choose {', '.join(FILE_TYPES)}")
    if out.suffix != ".gguf" or out.exists():
        raise ConfigError(f"{out}: name a file that ends in .gguf and is not there yet")
    raw, reader, where = open_checkpoint(target.base)
    causal(skeleton(raw, where, reader), "a GGUF")
    tokenizer = load_tokenizer(target.base)
    device = pick_device(options.device)
    # Codes and norms as the run had them; from there on all is float32.
    dtype = pick_dtype(stored_dtype(options.dtype, target.dtype, {"torch_dtype": "float32"} | raw), device)
    model = causal(load_parts(target, options, dtype, device), "a GGUF")
    refuse_unmergeable(model)
    model.float()
    count = sum(1 for _ in adapted_layers(model))

    partial = out.with_name(f".{out.stem}.partial-{os.getpid()}.gguf")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_gguf(model, tokenizer, partial, kind)
        found = check(partial, model, tokenizer, {name: stored_as(name, shape, kind) for name, shape in shapes(model)})
        with partial.open("rb") as f:
            os.fsync(f.fileno())
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    notes = [
        f"{count} adapted layers merged; {out.stat().st_size / 1e6:.1f} MB in {out}",
        f"read back: largest error of a weight {found.weight_error:.2g}, of a logit {found.logit_error:.2g}, "
        f"KL divergence {found.kl:.2g} per token (limit {found.kl_limit:.0e})",
    ]
    return {"type": kind, "bytes": out.stat().st_size, "merged_layers": count, **asdict(found), "notes": notes}
