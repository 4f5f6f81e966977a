"""`qlora bench normality`: are the weights of a hidden unit normally distributed, as NormalFloat supposes?

The paper's Appendix F tests the weights of every output unit (a row of a weight) of LLaMA 7B with Shapiro and Wilk's
test, and finds 7.5 % of them not normal at the 5 % level, where normal weights would give 5 %. The test finds smaller
deviations the longer a row is, so a share is read beside the one of a control: normal weights of the same shape,
stored the same way. A file in few bits has its weights on a grid (the demo's model is such a file), so for a GGUF the
control goes through the file's own type. How far the weights are from normal, whatever the test's power, is told by
their excess kurtosis: 0 for normal weights, above it for heavier tails. Of a row of more than 5,000 values, for which
the test's p-values were not made, as many are drawn.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats

import models
from models.checkpoint import linear_weights
from models.device import pick_device
from train.demo_model import demo_model

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.command import BenchOptions

LEVEL = 0.05
LONGEST = 5000  # Royston's p-values hold for so many values; of a longer row as many are drawn
ROWS = 256  # of a layer, evenly spaced, where no limit says otherwise
QUANTILES = (np.arange(99) + 1) / 100
PAPER = {"model": "LLaMA 7B", "not_normal": 0.075}


def bench(options: "BenchOptions", console: "Console") -> dict[str, Any]:
    path = Path(options.model or demo_model())
    model = models.load(path, dtype=torch.float32, device=pick_device(options.device))
    layers = {name: layer.weight for name, layer in linear_weights(model).items() if not layer.in_head}
    stored_as = block_type(path)
    found: dict[str, list[Tested]] = {}
    controls: dict[str, list[Tested]] = {}
    for number, (name, weight) in enumerate(layers.items()):
        rows = chosen_rows(weight, options.limit or ROWS)
        kind = re.split(r"\d+\.", name)[-1].removesuffix(".weight")
        found.setdefault(kind, []).append(tested(rows, number))
        controls.setdefault(kind, []).append(tested(as_stored(normal_like(rows, number), stored_as), number))
    result = [summary(kind, found[kind], controls[kind]) for kind in found]
    every = [each for kind in found for each in found[kind]], [each for kind in found for each in controls[kind]]
    result.append(summary("all", *every))
    show(console, result, stored_as)
    if options.plot:
        draw(result, path.name, options.plot)
    return {
        "model": path.name,
        "stored_as": stored_as,
        "level": LEVEL,
        "rows_of_a_layer_at_most": options.limit or ROWS,
        "values_of_a_row_at_most": LONGEST,
        "paper": PAPER,
        "rows": result,
    }


@dataclass(frozen=True, eq=False)
class Tested:
    """What the rows of one layer have given."""

    p: Float[np.ndarray, " rows"]
    kurtosis: Float[np.ndarray, " rows"]
    quantiles: Float[np.ndarray, "99 rows"]
    """Of a row's weights, less their mean and over their standard deviation."""
    constant: int
    """Rows left out."""
    length: int
    """Values of a row that were tested."""


def chosen_rows(weight: torch.Tensor, count: int) -> Float[np.ndarray, "rows inputs"]:
    """At most so many of a weight's rows, evenly spaced."""
    numbers = np.linspace(0, len(weight) - 1, min(count, len(weight))).round().astype(int)
    return weight.detach()[torch.from_numpy(numbers).to(weight.device)].double().cpu().numpy()


def tested(rows: Float[np.ndarray, "rows inputs"], seed: int) -> Tested:
    """Shapiro and Wilk's test of every row; one whose values are all equal has no distribution, and is only counted."""
    if rows.shape[1] > LONGEST:
        rows = rows[:, np.random.default_rng(seed).choice(rows.shape[1], LONGEST, replace=False)]
    kept = rows[np.ptp(rows, axis=1) > 0]
    scaled = (kept - kept.mean(1, keepdims=True)) / kept.std(1, keepdims=True)
    p = np.array([stats.shapiro(row).pvalue for row in scaled])
    return Tested(
        p, (scaled**4).mean(1) - 3, np.quantile(scaled, QUANTILES, axis=1), len(rows) - len(kept), rows.shape[1]
    )


def normal_like(rows: Float[np.ndarray, "rows inputs"], seed: int) -> Float[np.ndarray, "rows inputs"]:
    """Normal rows with the mean and the spread of those."""
    drawn = np.random.default_rng((1, seed)).standard_normal(rows.shape)
    return rows.mean(1, keepdims=True) + rows.std(1, keepdims=True) * drawn


def block_type(path: Path) -> str | None:
    """The type that most matrices of a GGUF file are stored in; None for other files and for plain floats."""
    if path.suffix != ".gguf":
        return None
    from gguf import GGUFReader

    types = Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1)
    name = types.most_common(1)[0][0]
    return None if name in ("F32", "F16", "BF16") else name


def as_stored(rows: Float[np.ndarray, "rows inputs"], stored_as: str | None) -> Float[np.ndarray, "rows inputs"]:
    """What is left of the rows in a file of that type."""
    if stored_as is None:
        return rows.astype(np.float32).astype(np.float64)
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[stored_as]
    return quants.dequantize(quants.quantize(rows.astype(np.float32), kind), kind).astype(np.float64)


def summary(kind: str, found: list[Tested], control: list[Tested]) -> dict[str, Any]:
    """One line of the table: of how many rows, how many are not normal, and how heavy their tails are."""
    p, kurtosis = np.concatenate([each.p for each in found]), np.concatenate([each.kurtosis for each in found])
    quantiles = [np.median(np.concatenate([e.quantiles for e in each], axis=1), axis=1) for each in (found, control)]
    return {
        "kind": kind,
        "units": len(p),
        "constant": sum(each.constant for each in found),
        "values": sorted({each.length for each in found}),
        "not_normal": share(p),
        "control_not_normal": share(np.concatenate([each.p for each in control])),
        "excess_kurtosis": [round(float(each), 3) for each in np.quantile(kurtosis, (0.05, 0.5, 0.95))],
        "quantiles": [round(float(each), 4) for each in quantiles[0]],
        "control_quantiles": [round(float(each), 4) for each in quantiles[1]],
    }


def share(p: Float[np.ndarray, " units"]) -> dict[str, float]:
    """The share of units that are not normal at the level, with Wilson's 95 % interval."""
    found = stats.binomtest(int((p < LEVEL).sum()), len(p))
    interval = found.proportion_ci(method="wilson")
    return {"value": found.statistic, "low": interval.low, "high": interval.high}


def show(console: "Console", rows: list[dict[str, Any]], stored_as: str | None) -> None:
    from rich.table import Table

    control = f"normal weights in {stored_as}" if stored_as else "normal weights"
    table = Table("layer", "units", "values", f"not normal at {LEVEL:.0%}", control, "excess kurtosis (5, 50, 95 %)")
    for row in rows:
        shares = [
            f"{each['value']:.1%} [{each['low']:.1%}, {each['high']:.1%}]"
            for each in (row["not_normal"], row["control_not_normal"])
        ]
        values, kurtosis = (", ".join(map(str, row[key])) for key in ("values", "excess_kurtosis"))
        table.add_row(row["kind"], str(row["units"]), values, *shares, kurtosis)
    console.print(table)


def draw(rows: list[dict[str, Any]], name: str, target: Path) -> None:
    """The shares by kind of layer, and how far the quantiles of a unit's weights are from normal ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = range(len(rows))
    for key, colour, label in (("not_normal", "C0", "weights"), ("control_not_normal", "0.6", "normal, stored alike")):
        offset = 0.2 if colour == "C0" else -0.2
        left.barh(
            [place + offset for place in places], [row[key]["value"] for row in rows], 0.4, color=colour, label=label
        )
    left.axvline(LEVEL, color="0.3", linewidth=0.8, linestyle="--")
    left.set_yticks(places, [row["kind"] for row in rows])
    left.set(xlabel=f"units not normal at the {LEVEL:.0%} level", title=name)
    left.margins(x=0.9)  # room for the legend
    left.legend(frameon=False, loc="lower right")
    normal = stats.norm.ppf(QUANTILES)
    for row in rows[:-1]:
        right.plot(normal, np.subtract(row["quantiles"], row["control_quantiles"]), linewidth=1, label=row["kind"])
    right.axhline(0, color="0.3", linewidth=0.8, linestyle="--")
    right.set(
        xlabel="quantile of the normal distribution",
        ylabel="median unit, less that of normal weights",
        title="standardized weights",
    )
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=120)
