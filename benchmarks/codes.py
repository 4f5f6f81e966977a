"""`qlora bench codes`: what better codes in the same format are worth, and whether fine-tuning notices.

A reader multiplies a level by a scale, so codes and scales can be chosen in better ways than the nearest level under
absmax. The ladder tries each way alone and together: squared error of the weights, and what counts, perplexity on
texts other than the calibration's, as the share that is left of what plain NF4 with double quantization adds to the
16-bit model's. Beside it, at equal memory or more: smaller blocks, scales in 32 bits, and adapters that start as
LoftQ's and PiSSA's do. `benchmarks/bases.py` then trains the same adapters on some of these bases.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

import models
from benchmarks import bases, corpora
from benchmarks.kept import Kept
from benchmarks.quality import Corpus, Estimate, added, corpus, perplexity, share_added, window_losses
from benchmarks.tables import show
from models.calibrate import Calibration
from models.checkpoint import unprepared
from models.device import pick_device
from models.errors import ConfigError
from models.linear import AdaptableLinear, NF4Linear
from models.llama import Llama, causal
from models.lora import prepare_lora
from models.quantize import quantize_checkpoint
from nf4 import QuantConfig
from train.calibration import calibration_windows
from train.demo_model import demo_model

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.command import BenchOptions

SEARCH = QuantConfig(scale="search")
CALIBRATION = "calibration"  # the name of --data that is not a corpus
WINDOWS = 32  # of calibration text in the ladder
TOKENS = 512
RANK = 16


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the base of a row comes about."""

    quant: QuantConfig | None = QuantConfig()
    calibration: dict[str, Any] | None = None
    """Settings of `Calibration` but for its text; None without one."""
    windows: int = WINDOWS
    init: str = "default"
    """Of the adapters that belong to the base, without which it is not measured."""


FEEDBACK: dict[str, Any] = {"method": "feedback", "asymmetric": False}
BEST: dict[str, Any] = {"method": "feedback", "asymmetric": True}
DENSE, REFERENCE = "16 bit", "NF4"
OURS = "asymmetric feedback"  # over scales from the weighted search
LADDER = {  # each step alone, then together, then with more text, then with more bits
    DENSE: Way(quant=None),
    REFERENCE: Way(),
    "signed search": Way(quant=SEARCH),
    "weighted search": Way(quant=SEARCH, calibration={"method": "weighted", "asymmetric": False}),
    "feedback": Way(calibration=FEEDBACK),
    "feedback and search": Way(quant=SEARCH, calibration=FEEDBACK),
    "asymmetric weighted search": Way(quant=SEARCH, calibration={"method": "weighted", "asymmetric": True}),
    OURS: Way(quant=SEARCH, calibration=BEST),
    f"{OURS}, twice the text": Way(quant=SEARCH, calibration=BEST, windows=2 * WINDOWS),
    f"{OURS}, four times the text": Way(quant=SEARCH, calibration=BEST, windows=4 * WINDOWS),
    "NF4, block 32": Way(quant=QuantConfig(block_size=32)),
    f"{OURS}, block 32": Way(quant=QuantConfig(block_size=32, scale="search"), calibration=BEST),
    "NF4, scales in 32 bits": Way(quant=QuantConfig(double_quant=False)),
    "PiSSA, rank 16": Way(init="pissa"),
    "LoftQ, rank 16": Way(init="loftq"),
    "NF4, block 8": Way(quant=QuantConfig(block_size=8)),
}


@dataclass(frozen=True)
class Setting:
    """What all rows have in common."""

    model: Path
    device: str
    corpora: list[Corpus]
    text: Int[Tensor, "windows tokens"]
    """To calibrate on."""
    work: Path
    kept: Kept


def bench(options: "BenchOptions", console: "Console") -> dict[str, Any]:
    """The ladder, then adapters trained on some of its bases."""
    with tempfile.TemporaryDirectory() as temporary:
        setting, data = settings(options, Path(options.work or temporary))
        rows = ladder(setting, console.print)
        show_ladder(console, rows, [each.name for each in setting.corpora])
        tuned = bases.measure(setting, options.seeds, console.print)
        bases.show_bases(console, tuned)
        if options.plot:
            draw(rows, [each.name for each in setting.corpora], options.plot)
        return {"model": setting.model.name, **data, "rows": rows, **tuned}


def settings(options: "BenchOptions", work: Path) -> tuple[Setting, dict[str, Any]]:
    """Read the data; what identifies it comes beside it."""
    named = corpora.named_files(options.data)
    if not named.keys() - {CALIBRATION}:
        raise ConfigError("data: name the texts that perplexity is measured on, as NAME=PATH (valid=wikitext2.txt)")
    model = Path(options.model) if options.model else demo_model()
    tokenizer = models.load_tokenizer(model)
    texts = [corpus(name, path, tokenizer, options.limit or 64) for name, path in named.items() if name != CALIBRATION]
    wanted = max(way.windows for way in LADDER.values())
    if CALIBRATION in named:
        text = calibration_windows(named[CALIBRATION], tokenizer, wanted, TOKENS)
    else:
        text = bases.training_text(model, wanted, TOKENS)
    windows = {each.name: len(each.windows) for each in texts}
    data = {"data": corpora.described(options.data), "windows": windows, "calibration_tokens": text.numel()}
    kept = Kept(work, {"model": model.name, **data})
    return Setting(model, str(pick_device(options.device)), texts, text, work, kept), data


def ladder(setting: Setting, tell: Callable[[str], Any], names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A row for each way, measured or as it was kept; if only some are named, the first two have to be among them."""
    found = {}
    for name in names or LADDER:
        found[name] = setting.kept.made(name, partial(measured, setting, name, LADDER[name]))
        tell(f"{name}: done")
    return [row(name, result, found) for name, result in found.items()]


def measured(setting: Setting, name: str, way: Way) -> dict[str, Any]:
    """Losses of every window, and what the weights lost and take."""
    model = prepared(setting, name, way)
    losses = {each.name: window_losses(model, each).tolist() for each in setting.corpora}
    return {**asdict(way), "losses": losses, **weights_of(model, setting)}


def prepared(setting: Setting, name: str, way: Way) -> Llama:
    """The model of a row."""
    prepare = unprepared
    if way.init != "default":
        prepare = partial(
            prepare_lora, config=models.LoraConfig(rank=RANK, alpha=RANK, init=way.init, dtype="bfloat16")
        )
    source, quant = (checkpoint(setting, name, way), None) if way.calibration else (setting.model, way.quant)
    model = models.load(source, quant, torch.bfloat16, setting.device, prepare=prepare)
    return causal(model.requires_grad_(False).eval(), "bench codes")


def checkpoint(setting: Setting, name: str, way: Way) -> Path:
    """Where the calibrated checkpoint of a row is; it is made if it is not there."""
    path = setting.work / "checkpoints" / name.replace(", ", "-").replace(" ", "-")
    if not path.exists():
        calibration = Calibration(setting.text[: way.windows], **(way.calibration or {}))
        device = torch.device(setting.device)
        quantize_checkpoint(setting.model, path, way.quant, device=device, calibration=calibration)
    return path


@torch.no_grad()
def weights_of(model: Llama, setting: Setting) -> dict[str, Any]:
    """Bits for each weight of the blocks' linear layers, adapters included, and their relative error."""
    dense = models.load(setting.model, dtype=torch.bfloat16, device=setting.device)
    bits, count, lost, size = 0, 0, 0.0, 0.0
    for name, layer in model.named_modules():
        if not isinstance(layer, AdaptableLinear) or layer.in_head:
            continue
        original = dense.get_parameter(f"{name}.weight").float()
        weight = layer.dense_weight().float()
        bits += 8 * (layer.quantized.nbytes if isinstance(layer, NF4Linear) else original.numel() * 2)
        if layer.lora_A is not None and layer.lora_B is not None:
            a, b = layer.lora_A.weight.float(), layer.lora_B.weight.float()
            weight = weight + layer.scaling * b @ a
            bits += 16 * (a.numel() + b.numel())
        count += original.numel()
        lost += float((weight - original).double().square().sum())
        size += float(original.double().square().sum())
    return {"bits_per_weight": bits / count, "relative_error": (lost / size) ** 0.5}


def row(name: str, result: dict[str, Any], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is told of a way: perplexities, and paired against the 16-bit model and plain NF4."""
    told = {key: value for key, value in result.items() if key != "losses"} | {"name": name}
    for text, values in result["losses"].items():
        losses, dense, reference = (
            np.array(v) for v in (values, *(found[n]["losses"][text] for n in (DENSE, REFERENCE)))
        )
        told[text] = {"perplexity": asdict(perplexity(losses)), "added": asdict(added(losses, dense))}
        told[text]["share_added"] = asdict(share_added(losses, reference, dense))
    return told


def show_ladder(console: "Console", rows: list[dict[str, Any]], texts: list[str]) -> None:
    from rich.table import Table

    figures = [{**r, "bits": r["bits_per_weight"]} for r in rows]
    show(console, [r["name"] for r in rows], figures, ["bits", "relative_error"])
    for text in texts:
        table = Table(text, "perplexity", "added to 16 bit", "share of what NF4 adds")
        for r in rows:
            estimates = [str(Estimate(**r[text][key])) for key in ("perplexity", "added", "share_added")]
            table.add_row(r["name"], *(estimates if r["name"] != DENSE else [estimates[0], "", ""]))
        console.print(table)


def draw(rows: list[dict[str, Any]], texts: list[str], target: Path) -> None:
    """The share that is left of what NF4 adds to the perplexity, a panel for each text."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if r["name"] != DENSE][::-1]
    figure = Figure(figsize=(4 + 3.2 * len(texts), 1.2 + 0.32 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False, sharey=True)[0]
    for axes, text in zip(panels, texts, strict=True):
        shares = [r[text]["share_added"] for r in rows]
        middle = [s["value"] for s in shares]
        spread = [[s["value"] - s["low"] for s in shares], [s["high"] - s["value"] for s in shares]]
        axes.errorbar(middle, range(len(rows)), xerr=spread, fmt="o", markersize=4, capsize=2)
        axes.axvline(1, color="0.6", linewidth=0.8)
        axes.axvline(0.5, color="0.6", linewidth=0.8, linestyle="--")
        axes.set(title=text, xlabel="share of what NF4 adds to the perplexity", xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [f"{r['name']} ({r['bits_per_weight']:.2f} bits)" for r in rows])
    figure.savefig(target, dpi=120)
