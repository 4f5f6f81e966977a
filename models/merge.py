"""`qlora merge TARGET OUT`: base and adapter become one 16-bit checkpoint, which is then asked whether it is the same.

The written checkpoint is read back and compared with the adapter on its base, in float32, so that what is seen is
what merging did and not what bfloat16 products do. Rounding the merged weights to bfloat16 costs SmolLM2-135M 1.5e-4
nats per position on random tokens and 0.8e-4 on English; float16 costs 2e-6. On the original weights the
whole quantization error comes back as a difference (0.41 and 0.28 nats): the adapter was trained around it, so
that this merge is another model, and not necessarily a better one.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize
from tyro.conf import Positional

from models.compare import Comparison, answers, compare, random_probe, text_probe
from models.device import pick_device, pick_dtype
from models.errors import CheckpointError, ConfigError, DataError
from models.lazy import load_lazily
from models.merging import FLOATS, MergedLayer, merge_checkpoint, own_original, refuse_used
from models.model import Model
from models.precision import parts_in_memory, statement
from models.target import LoadOptions, Target, load_parts, resolve
from models.tokenizer import find_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

DECODED_MAX_KL = 2e-3  # an order of magnitude above bfloat16's rounding in a small model, 1/30 of a short training
ORIGINAL_MAX_KL = 1.0  # NF4's error in a model of 135 M weights, twice; larger models have less
UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Merge an adapter into its base, and check the result."""

    target: Positional[str]
    """A run, or a checkpoint with --load.adapter."""
    out: Positional[str]
    """Directory to write, new or empty."""
    base: str | None = None
    """The original 16-bit checkpoint to merge into; by default the decoded 4-bit weights, which the adapter was
    trained on."""
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """What the merged weights are rounded to."""
    shard_size: str = "4GiB"
    """Largest file to write, and so the memory that writing takes: 500MB, 2GiB, ..."""
    text: str | None = None
    """Compare on the first tokens of this UTF-8 file; by default on random tokens."""
    seed: int = 0
    """Decides the random tokens."""
    max_kl: float | None = None
    """Largest mean divergence to accept, in nats per position: 0.002 by default, 1.0 with --base."""
    load: LoadOptions = LoadOptions()
    """How the base is loaded; a run says so itself."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        if self.max_kl is not None and not self.max_kl >= 0:
            raise ValueError(f"max_kl is {self.max_kl}; a divergence is at least 0")
        byte_count(self.shard_size)


def command(options: MergeOptions, console: "Console") -> dict[str, Any]:
    refuse_used(Path(options.out))
    text = None if options.text is None else read_probe(options.text)
    target = resolve(options.target, options.load)
    tokenizer = find_tokenizer(target.base)
    model = load_merging(target, options.load)
    if text is None:
        probe = random_probe(model, options.seed)
    else:
        probe = text_probe(model, load_tokenizer(target.base), text)
    dtype, noise_of = getattr(torch, options.dtype), noise_source(model, options.base)
    console.print(f"{target.adapter} on {target.base}\n{statement(parts_in_memory(model))}")
    layers = merge_checkpoint(model, options.out, options.base, dtype, byte_count(options.shard_size), tokenizer)
    size = sum(file.stat().st_size for file in Path(options.out).glob("*.safetensors"))
    console.print(layer_table(layers, noise_of))
    console.print(f"{size / 1e6:.1f} MB in {options.out}: {options.base or 'the decoded base'} with the adapter")

    device, before = model.device, answers(in_float32(model), probe)
    del model  # so that the two are never in memory together
    result = compare(before, answers(load_lazily(options.out, torch.float32, device), probe))
    bound = options.max_kl
    if bound is None:
        bound = DECODED_MAX_KL if options.base is None else ORIGINAL_MAX_KL
    console.print(sentence(result, options.text))
    report = {
        "out": options.out,
        "bytes": size,
        "base": options.base or "decoded",
        "noise_against": noise_of,
        # JSON has no NaN or infinity, which a broken checkpoint may give.
        "comparison": {name: value if math.isfinite(value) else None for name, value in asdict(result).items()},
        "probe": options.text or f"random tokens, seed {options.seed}",
        "max_kl": bound,
        "within": result.mean_kl <= bound,
        "layers": [{**asdict(layer), "relative": layer.relative, "ratio": layer.ratio} for layer in layers],
    }
    if not result.mean_kl <= bound:
        refusal = CheckpointError(
            f"the merged checkpoint is {result.mean_kl:.3g} nats per position from the adapter on its base; "
            f"--max-kl allows {bound:g}. The files are kept in {options.out}: delete them, or merge again "
            "into another directory with a larger --max-kl if this is what you want"
        )
        refusal.report = report
        raise refusal
    return report


def load_merging(target: Target, options: LoadOptions) -> Model:
    """The model as it was trained: codes are chosen for weights in the run's dtype."""
    if target.adapter is None and target.run is not None:
        raise CheckpointError(
            f"{target.run}: nothing to merge, since every weight was trained; the whole model is in {target.base}"
        )
    if target.adapter is None:
        raise CheckpointError(f"{target.base}: no adapter to merge; name a run, or give --load.adapter DIRECTORY")
    device = pick_device(options.device)
    dtype = pick_dtype(target.dtype or "auto" if options.dtype == "auto" else options.dtype, device)
    return load_parts(target, options, dtype, device)


def in_float32(model: Model) -> Model:
    """The same model with float32 activations; what is trained in another dtype than it computes in is settled."""
    for module in list(model.modules()):
        for leaf in list(getattr(module, "parametrizations", ())):
            value = getattr(module, leaf).detach()
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    return model.float()


def noise_source(model: Model, base: str | None) -> str | None:
    """The checkpoint that quantization noise is measured against, and how it holds its weights; None without one."""
    if base is not None:
        return base
    original = own_original(model)
    if original is None:
        return None
    kinds = {original.stored(name).kind for name in original.shapes if len(original.shapes[name]) > 1}
    rounded = ", itself rounded" if kinds - FLOATS else ""
    return f"{model.source} ({', '.join(sorted(kinds))}{rounded})"


def layer_table(layers: Sequence[MergedLayer], noise_of: str | None) -> "Table":
    """Layers by signal over noise, the weakest first; those below 1 are marked."""
    from rich.table import Table

    ratios = [layer.ratio for layer in layers if layer.ratio is not None]
    below = sum(ratio < 1 for ratio in ratios)
    if noise_of is None:
        caption = "The noise is not known: the base came in 4 bits. --base names the original to measure it."
    elif ratios:
        caption = f"{below} of {len(ratios)} layers have less signal than noise (!); the noise is against {noise_of}."
    else:
        caption = "No noise: the base is not quantized, or what quantizing lost went into the adapter's start."
    table = Table(title="Adapter's signal against quantization noise", caption=caption)
    for column in ("layer", "signal", "noise", "signal/noise", "signal/weight"):
        table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
    for layer in sorted(layers, key=lambda layer: (layer.ratio or 0.0, layer.relative)):
        ratio = layer.ratio
        table.add_row(
            layer.name,
            f"{layer.signal:.4g}",
            "?" if layer.noise is None else f"{layer.noise:.4g}",
            "?" if ratio is None else f"[red]! {ratio:.3f}[/red]" if ratio < 1 else f"{ratio:.3f}",
            f"{layer.relative:.5f}",
        )
    return table


def sentence(result: Comparison, text: str | None) -> str:
    where = "random tokens" if text is None else text
    return (
        f"against the adapter on its base, {result.positions} positions of {where}, float32: largest logit "
        f"difference {result.max_logit_difference:.4g}; KL divergence {result.mean_kl:.3g} nats per position, "
        f"at most {result.max_kl:.3g}; same most likely answer at {result.argmax_agreement:.2%}"
    )


def byte_count(text: str) -> int:
    """The bytes that 500MB or 2GiB stand for."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and UNITS.get(match[2].upper())
    count = int(float(match[1]) * unit) if match and unit else 0
    if count < 1:
        raise ConfigError(f"shard_size is {text!r}; give a size such as 500MB or 2GiB")
    return count


def read_probe(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text ({error})") from error
