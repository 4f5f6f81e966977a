"""Loss and learning rate over the steps of one run or of several, from their metrics.jsonl.

A step's loss jumps with its examples, so it is drawn faintly, and over it a running mean. Held-out loss is
drawn as points, since it was measured at single steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from models.errors import ConfigError
from train.run import read_metrics

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Plot loss and learning rate of one run, or of several in one picture."""

    runs: Positional[tuple[str, ...]]
    """Directories of runs."""
    out: str | None = None
    """The picture, without its ending: .png and .svg are written; by default the first run's plots/loss."""
    json: bool = False
    """Print one JSON object on stdout."""


def command(options: PlotOptions, console: "Console") -> dict[str, Any]:
    if not options.runs:
        raise ConfigError("there is no run to plot; name one or more run directories")
    target = Path(options.out or Path(options.runs[0]) / "plots" / "loss.png")
    files = [str(path) for path in plot_runs(options.runs, target)]
    console.print(f"wrote {' and '.join(files)}")
    return {"files": files}


def plot_runs(runs: Sequence[Path | str], target: Path | str) -> list[Path]:
    """Draw the runs into `target` as PNG and as SVG, and give the two paths."""
    from matplotlib.figure import Figure  # drawn by Agg and by the SVG writer: no display, no global state

    if not runs:
        raise ConfigError("there is no run to plot")
    records = {Path(run).resolve().name: read_metrics(run) for run in runs}
    if len(records) < len(runs):  # runs of one name in different places
        records = {str(run): read_metrics(run) for run in runs}

    figure = Figure(figsize=(8, 6), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for index, (name, lines) in enumerate(records.items()):
        draw(loss, rate, lines, f"C{index}", f"{name}: " if len(records) > 1 else "")
    loss.set(ylabel="loss per label token (nats)", title=next(iter(records)) if len(records) == 1 else "Loss")
    rate.set(ylabel="learning rate", xlabel="optimizer step", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    rate.xaxis.get_major_locator().set_params(integer=True)
    for axes in (loss, rate):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if loss.get_legend_handles_labels()[0]:
        loss.legend(frameon=False)

    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    files = [target.with_suffix(".png"), target.with_suffix(".svg")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files


def draw(loss: Any, rate: Any, lines: Sequence[dict[str, Any]], color: str, prefix: str) -> None:
    """Draw one run on the two axes."""
    trained = [line for line in lines if line["split"] == "train"]
    held_out = [line for line in lines if line["split"] == "eval"]
    if trained:
        steps = [line["step"] for line in trained]
        losses = [line["loss"] for line in trained]
        loss.plot(steps, losses, color=color, alpha=0.3, linewidth=1, label=f"{prefix}training, each step")
        window = max(1, len(steps) // 20)
        if window > 1:
            loss.plot(
                steps,
                smooth(losses, window),
                color=color,
                linewidth=2,
                label=f"{prefix}training, mean of ~{window} steps",
            )
        rate.plot(steps, [line["lr"] for line in trained], color=color, linewidth=1.5)
    if held_out:
        points = [line["step"] for line in held_out], [line["loss"] for line in held_out]
        style = {"color": color, "marker": "o", "markeredgecolor": "white", "linestyle": "--", "linewidth": 1}
        loss.plot(*points, **style, markersize=7, zorder=3, label=f"{prefix}held out")


def smooth(values: Sequence[float], window: int | float) -> list[float]:
    """Give the exponential running mean over about `window` values, without a pull towards a made-up start.

    >>> smooth([2.0, 2.0, 2.0], 10)
    [2.0, 2.0, 2.0]
    """
    keep = math.exp(-1 / window)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means
