"""`qlora export TARGET OUT`: what was trained here, in a form that other tools load.

    adapter   adapter_model.safetensors and adapter_config.json, as PEFT reads them
    nf4       the base in 4 bits, as bitsandbytes reads it
    gguf      base and adapter merged, one file for llama.cpp

Each export is read back before the command calls itself done. An adapter is never lost on the way: a format that
has no place for it says so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from models.adapter_export import export_adapter
from models.errors import ConfigError
from models.gguf_export import export_gguf
from models.nf4_export import export_nf4
from models.target import LoadOptions, resolve

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("adapter", "nf4", "gguf")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a run or checkpoint for other tools."""

    target: Positional[str]
    """A run or a checkpoint; with --load.adapter, a checkpoint and its adapter."""
    out: Positional[str]
    """Directory to write (for gguf, the file); one that exists with content is refused."""
    format: str = "adapter"
    """adapter (PEFT's layout), nf4 (4 bits as bitsandbytes reads them) or gguf (merged, for llama.cpp)."""
    gguf_type: str = "f16"
    """What a GGUF stores matrices in: f32, bf16, f16 or q8_0."""
    merge: bool = False
    """For nf4: merge the adapter and quantize the result again, which loses some of what it learned."""
    base: str | None = None
    """For adapter: the name of the base that its config gives to others; by default the path as it is known here."""
    load: LoadOptions = LoadOptions()
    """How the model is loaded."""
    json: bool = False
    """Print one JSON object on stdout."""


def command(options: ExportOptions, console: "Console") -> dict[str, Any]:
    if options.format not in FORMATS:
        raise ConfigError(f"export: format {options.format!r} is not known; choose {', '.join(FORMATS)}")
    if options.merge and options.format != "nf4":
        raise ConfigError("export: --merge is for --format nf4; a GGUF is always merged, an adapter never")
    target, out = resolve(options.target, options.load), Path(options.out)
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out}: is not empty; name another directory")
    if options.format == "adapter":
        result = export_adapter(target, out, options.load, options.base)
    elif options.format == "nf4":
        result = export_nf4(target, out, options.load, options.merge)
    else:
        result = export_gguf(target, out, options.load, options.gguf_type)
    for line in result["notes"]:
        console.print(line)
    return {"out": str(out), "format": options.format, **result}
