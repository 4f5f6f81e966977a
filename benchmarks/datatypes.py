"""`qlora bench datatypes`: what each data type costs in perplexity and in squared error, for the bits it takes.

The paper's Table 2 compares 4-bit types by perplexity and its Figure 3 by accuracy against a model's total bits. Here
every linear layer of the blocks is stored in a type, decoded, and the model measured with the decoded weights on the
same windows of text; bits per weight are counted on what is stored. Which of the paper's types is better than which
is told with an interval over windows drawn in pairs.

The weights start as the checkpoint has them. Where that is itself quantized (the demo's model is a Q4_1 GGUF),
what is found is the loss on top, and types whose levels resemble the file's have it easier.
"""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import kernels
import models
from benchmarks import corpora
from benchmarks.datatypes_plot import draw
from benchmarks.kept import Kept
from benchmarks.quality import Corpus, Estimate, Weights, added, perplexity, window_losses
from models.device import pick_device, pick_dtype
from models.errors import ConfigError
from models.fingerprint import fingerprint
from models.llama import Llama, causal
from models.model import Model
from nf4 import QuantConfig
from train.demo_model import demo_model

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.command import BenchOptions

BLOCK = 64
SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCORED_SIZES = (32, 64, 256, 4096)  # for perplexities, which take their time
FOUR_BITS = ("int4", "fp4-e2m1", "fp4-e3m0", "fp4", "nf4")
OTHER_BITS = ("nf2", "nf3", "int8", "nf8")
PAPER = {"int4": 34.34, "fp4-e2m1": 31.07, "fp4-e3m0": 29.48, "nf4+DQ": 27.41}  # Table 2: Pile Common Crawl
DENSE = "16 bit"


def bench(options: "BenchOptions", console: "Console") -> dict[str, Any]:
    device = pick_device(options.device)
    dtype, path = pick_dtype("auto", device), options.model or demo_model()
    model = models.load(path, dtype=dtype, device=device)
    described = corpora.described(options.data)
    folder = Path(options.work) / "datatypes" if options.work else None
    kept = Kept(folder, {"model": fingerprint(path), "dtype": str(dtype), "limit": options.limit})
    texts = texts_for(model, path, options, console)
    hashes = {text.name: described.get(text.name, {"sha256": "sampled"})["sha256"][:12] for text in texts}

    configs = {title(config): config for config in grid()}
    losses = measure(causal(model, "perplexity"), texts, hashes, configs, kept, console) if texts else {}
    rows: list[dict[str, Any]] = [{"datatype": DENSE, "bits_per_weight": 16, "relative_error": 0}]
    for name, config in configs.items():
        found = kept.made(name, lambda config=config: stored(model, config))
        sizes = {"block_size": config.block_size, "double_quant": config.double_quant}
        rows.append({"datatype": config.codebook, **sizes, **found})
    for text in texts:
        dense, nf4 = losses[text.name, DENSE], losses[text.name, title(QuantConfig("nf4", BLOCK, False))]
        for row, name in zip(rows, [DENSE, *configs], strict=True):
            if (text.name, name) in losses:
                row.setdefault("corpora", {})[text.name] = figures(losses[text.name, name], dense, nf4)
    orders = [found for text in texts for size in SIZES if (found := order(text.name, size, losses))]

    show(console, rows, [text.name for text in texts])
    for each in orders:
        steps = "; ".join(told(step) for step in each["steps"])
        console.print(f"{each['text']}, blocks of {each['block_size']}: {steps}", markup=False)
    if options.plot:
        draw(rows, [text.name for text in texts], options.plot)
    return {
        "model": Path(path).name,
        "dtype": str(dtype).removeprefix("torch."),
        "data": described,
        "windows": {text.name: list(text.windows.shape) for text in texts},
        "paper": PAPER,
        "rows": rows,
        "orders": orders,
    }


def texts_for(model: Model, path: str | Path, options: "BenchOptions", console: "Console") -> list[Corpus]:
    """What the model is to predict; nothing where it predicts no next token, and errors alone are told."""
    if isinstance(model, Llama):
        return corpora.read(options.data, options.limit, model, path)
    if options.data:
        raise ConfigError(
            f"perplexity needs a causal language model, but this is {type(model).__name__}: leave out data"
        )
    console.print(f"{type(model).__name__} predicts no next token: errors only")
    return []


def grid() -> Iterator[QuantConfig]:
    """4-bit types in blocks of every size, the others in blocks of 64; with double quantization NF4 as the former."""
    for double_quant in (False, True):
        for size in SIZES:
            swept = ("nf4",) if double_quant else FOUR_BITS
            for name in FOUR_BITS + OTHER_BITS if size == BLOCK else swept:
                yield QuantConfig(name, size, double_quant)


def is_scored(config: QuantConfig, first: bool) -> bool:
    """Every type in blocks of 64 on each text; the paper's in blocks of other sizes on the first."""
    if config.double_quant and config.codebook != "nf4":
        return False
    return config.block_size == BLOCK or (first and config.block_size in SCORED_SIZES and config.codebook != "fp4")


def title(config: QuantConfig) -> str:
    return f"{config.codebook}{'+DQ' if config.double_quant else ''}, block {config.block_size}"


def measure(
    model: Llama,
    texts: list[Corpus],
    hashes: dict[str, str],
    configs: dict[str, QuantConfig],
    kept: Kept,
    console: "Console",
) -> dict[tuple[str, str], np.ndarray]:
    """Losses of the windows of every text under the weights as they are and under those of every type."""
    weights, losses = Weights(model), {}
    main_first = sorted(configs.items(), key=lambda item: item[1].block_size != BLOCK)
    for name, config in [(DENSE, None), *main_first]:
        chosen = [text for i, text in enumerate(texts) if config is None or is_scored(config, i == 0)]
        keys = {text.name: f"{name} on {text.name} {hashes[text.name]}" for text in chosen}
        if config and not all(map(kept.has, keys.values())):
            weights.change(lambda weight, config=config: decoded(weight, config))
        for text in chosen:
            found = kept.made(keys[text.name], lambda text=text: window_losses(model, text).tolist())
            losses[text.name, name] = np.array(found)
            console.print(f"{name} on {text.name}: {perplexity(losses[text.name, name])}", markup=False)
    weights.restore()
    return losses


def decoded(weight: torch.Tensor, config: QuantConfig) -> torch.Tensor:
    return kernels.dequantize(kernels.quantize(weight, config))


@torch.no_grad()
def stored(model: Model, config: QuantConfig) -> dict[str, float]:
    """Bits per weight as stored, and the relative error over the weights of all block linears together."""
    noise = signal = nbytes = count = 0
    for name, layer in models.checkpoint.linear_weights(model).items():
        if not layer.in_head:
            q = kernels.quantize(layer.weight, config, name=name)
            weight = layer.weight.float()
            signal += float(weight.square().sum(dtype=torch.float64))
            noise += float((weight - kernels.dequantize(q).float()).square().sum(dtype=torch.float64))
            nbytes, count = nbytes + q.nbytes, count + q.numel
    return {"bits_per_weight": 8 * nbytes / count, "relative_error": (noise / signal) ** 0.5}


def figures(losses: np.ndarray, dense: np.ndarray, nf4: np.ndarray) -> dict[str, dict[str, float]]:
    """Perplexity, and by how much it is above that of the dense weights and of NF4, with intervals."""
    found = {"perplexity": perplexity(losses), "above_16_bit": added(losses, dense), "above_nf4": added(losses, nf4)}
    return {name: asdict(each) for name, each in found.items()}


def order(text: str, size: int, losses: dict[tuple[str, str], np.ndarray]) -> dict[str, Any] | None:
    """The paper's types in blocks of one size from the highest perplexity down, each with how far it is above the next.

    None where they have not all been measured.
    """
    found = {name: losses.get((text, f"{name}, block {size}")) for name in PAPER}
    known = {name: each for name, each in found.items() if each is not None}
    if len(known) < len(found):
        return None
    names = sorted(known, key=lambda name: -known[name].mean())
    steps = [
        {"higher": high, "lower": low, "difference": asdict(added(known[high], known[low]))}
        for high, low in pairwise(names)
    ]
    return {"text": text, "block_size": size, "steps": steps}


def told(step: dict[str, Any]) -> str:
    difference = Estimate(**step["difference"])
    verdict = "is above" if difference.low > 0 else "cannot be told from"
    return f"{step['higher']} {verdict} {step['lower']} ({difference})"


def show(console: "Console", rows: list[dict[str, Any]], texts: list[str]) -> None:
    """The types in blocks of 64 in full, and every 4-bit type in blocks of every size."""
    from rich.table import Table

    def cells(row: dict[str, Any], text: str) -> list[str]:
        found = row.get("corpora", {}).get(text, {})
        return [str(Estimate(**each)) for each in found.values()] or [""] * 3

    for text in texts or [""]:
        heads = ["perplexity", "above 16 bit", "above NF4"] if text else []
        table = Table("blocks of 64", "bits", "relative error", *heads, title=text or None)
        for row in rows:
            if row.get("block_size", BLOCK) == BLOCK:
                figures = (f"{row['bits_per_weight']:.3f}", f"{row['relative_error']:.4f}")
                table.add_row(label(row), *figures, *(cells(row, text) if text else []))
        console.print(table)
    by_place = {(label(row), row["block_size"]): row for row in rows[1:]}
    names = [*FOUR_BITS, "nf4+DQ"]
    for title, value in {
        "relative error": lambda row: row["relative_error"],
        **{f"perplexity, {text}": lambda row, t=text: row["corpora"][t]["perplexity"]["value"] for text in texts[:1]},
    }.items():
        table = Table("block", *names, title=title)
        for size in SIZES:
            found = [by_place[name, size] for name in names]
            measured = ["corpora" in row or title == "relative error" for row in found]
            shown = [f"{value(row):.4g}" if known else "" for row, known in zip(found, measured, strict=True)]
            if any(shown):
                table.add_row(str(size), *shown)
        console.print(table)


def label(row: dict[str, Any]) -> str:
    return row["datatype"] + ("+DQ" if row.get("double_quant") else "")
