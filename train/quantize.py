"""`qlora quantize SRC OUT`: a raw checkpoint to NF4 safetensors, and with `--calibrate` codes chosen on some text.

The table says what each layer lost. Calibrated codes are further from the weights than the nearest ones would be, and
closer in what the layer computes: that is the column beside it.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from models.calibrate import Calibration
from models.device import pick_device, pick_dtype
from models.errors import ConfigError
from models.precision import statement_on_disk
from models.quantize import LayerReport, quantize_checkpoint
from models.tokenizer import load_tokenizer
from nf4 import QuantConfig
from nf4.calibrated import Method
from train.calibration import calibration_windows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Stream a raw checkpoint into 4-bit safetensors."""

    src: Positional[str]
    """Directory or file of the checkpoint: safetensors, .bin, Meta's .pth, fairseq's .pt or GGUF."""
    out: Positional[str]
    """Directory to write; one that holds a checkpoint already is refused."""
    quant: QuantConfig = QuantConfig()
    """The format."""
    calibrate: str | None = None
    """Choose codes and scales for what layers compute on this text: a file of text, of documents, or of examples to
    learn from. Scales are searched for. The format stays the same. For LLaMA and RoBERTa."""
    method: Method = "feedback"
    """With calibrate: error feedback over searched scales (feedback), or the search alone, with each weight's error
    counted by the mean square of its input (weighted)."""
    asymmetric: bool = True
    """With calibrate: aim at what layers compute in the 16-bit model, and not only for the inputs they get by now."""
    windows: int = 128
    """With calibrate: how many windows of text are drawn from the file."""
    window: int = 512
    """With calibrate: how many tokens each has."""
    template: Literal["plain", "chat"] = "plain"
    """With calibrate: how examples are put into words, as in training."""
    seed: int = 42
    """With calibrate: decides which parts of the file are drawn."""
    dtype: str = "bfloat16"
    """What everything else is stored in, and what the codes decode to."""
    device: str = "auto"
    """Where to quantize."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        for name in ("windows", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        for name in ("method", "asymmetric", "windows", "window", "template", "seed"):
            if self.calibrate is None and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} says how to calibrate; name a text by --calibrate FILE")


def command(options: QuantizeOptions, console: "Console") -> dict[str, Any]:
    if (Path(options.out) / "config.json").exists():
        raise ConfigError(f"{options.out}: already holds a checkpoint; name another directory")
    device = pick_device(options.device)
    calibration, quant = chosen_text(options), options.quant
    if calibration is not None:
        quant = replace(quant, scale="search")
    dtype = pick_dtype(options.dtype, device)
    layers = quantize_checkpoint(options.src, options.out, quant, dtype, device, calibration=calibration)
    console.print(table_of(layers, f"{options.src} → {options.out}"))
    size = sum(f.stat().st_size for f in Path(options.out).glob("*.safetensors"))
    console.print(f"{len(layers)} layers in 4 bits; {size / 1e6:.1f} MB in {options.out}")
    if calibration is not None:
        console.print(f"calibrated on {calibration.windows.numel():,} tokens of {options.calibrate}", markup=False)
    console.print(statement_on_disk(options.out))
    return {"out": options.out, "bytes": size, "layers": [asdict(layer) for layer in layers]} | (
        {} if calibration is None else {"calibration_tokens": calibration.windows.numel()}
    )


def chosen_text(options: QuantizeOptions) -> Calibration | None:
    if options.calibrate is None:
        return None
    tokenizer = load_tokenizer(options.src)
    windows = calibration_windows(
        options.calibrate, tokenizer, options.windows, options.window, options.seed, options.template
    )
    return Calibration(windows, options.method, options.asymmetric)


def table_of(layers: list[LayerReport], title: str) -> "Table":
    from rich.table import Table

    calibrated = any(layer.output_error is not None for layer in layers)
    table = Table(title=title)
    columns = ["layer", "shape", "bits/weight", "relative error", "SNR, dB", "max error"]
    for column in [*columns, "error of outputs"] if calibrated else columns:
        table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
    for layer in layers:
        row = [
            layer.name,
            "×".join(map(str, layer.shape)),
            f"{layer.bits_per_weight:.3f}",
            f"{layer.relative_error:.4f}",
            f"{layer.snr_db:.2f}",
            f"{layer.max_error:.4f}",
        ]
        table.add_row(*row, *([f"{layer.output_error:.4f}"] if layer.output_error is not None else []))
    return table
