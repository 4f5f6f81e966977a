"""Loss and learning rate over the steps of one run or of several, from their metrics.jsonl.

A step's loss jumps with its examples, so it is drawn faintly, and over it a running mean. What is measured on held-out
examples is drawn as points, since it was measured at single steps: the loss, and in a panel each what else there is,
such as accuracy, also MMLU's. Of several runs each has a colour, and a line of the legend.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from eval.figures import save
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


@dataclass(frozen=True)
class Panel:
    """What is drawn beside the loss: a number in the lines of a split."""

    split: str
    name: str
    label: str


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

    measures = panels([line for lines in records.values() for line in lines])
    heights = (3, *(1.5 for _ in measures), 1)
    figure = Figure(figsize=(8, 1.5 * sum(heights)), layout="constrained")
    loss, *others, rate = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for index, lines in enumerate(records.values()):
        draw(loss, rate, lines, f"C{index}")
        for axes, measure in zip(others, measures, strict=True):
            draw_points(axes, lines, measure.name, f"C{index}", measure.split)
    loss.set(ylabel="loss per label token (nats)", title=next(iter(records)) if len(records) == 1 else "Loss")
    rate.set(ylabel="learning rate", xlabel="optimizer step", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    rate.xaxis.get_major_locator().set_params(integer=True)
    for axes, measure in zip(others, measures, strict=True):
        axes.set(ylabel=measure.label)
    for axes in (loss, *others, rate):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    explain(figure, loss, {name: f"C{index}" for index, name in enumerate(records)} if len(records) > 1 else {})

    return save(figure, Path(target))


def measured(lines: Iterable[dict[str, Any]]) -> list[str]:
    """What else than the loss was measured on held-out examples; whole numbers are counts and no measure.

    >>> measured([{"step": 5, "split": "eval", "loss": 2.0, "labels": 9, "accuracy": 0.5}])
    ['accuracy']
    """
    held_out = [line for line in lines if line["split"] == "eval"]
    return list(dict.fromkeys(k for line in held_out for k, v in line.items() if isinstance(v, float) and k != "loss"))


def panels(lines: Sequence[dict[str, Any]]) -> list[Panel]:
    """A panel for each measure that there is."""
    found = [Panel("eval", name, name) for name in measured(lines)]
    tracked = any(line["split"] == "mmlu" for line in lines)
    return [*found, Panel("mmlu", "accuracy", "MMLU accuracy")] if tracked else found


def explain(figure: Any, axes: Any, colours: Mapping[str, Any]) -> None:
    """Put up a legend: the styles of lines, and below the picture what each colour stands for, if there are several."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    styles = {label: handles[labels.index(label)] for label in dict.fromkeys(labels)}  # of equal ones the first
    if styles:
        legend = axes.legend(styles.values(), styles.keys(), frameon=False)
        if colours:
            for line in legend.legend_handles:
                line.set_color("0.4")
    if colours:
        lines = [Line2D([], [], color=colour, linewidth=3, label=name) for name, colour in colours.items()]
        columns = max(1, min(3, 90 // max(map(len, colours)), len(colours)))  # about 90 letters fit beside each other
        figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)


def draw(loss: Any, rate: Any, lines: Sequence[dict[str, Any]], color: str) -> None:
    """Draw one run's loss and learning rate on the two axes."""
    trained = [line for line in lines if line["split"] == "train"]
    if trained:
        steps = [line["step"] for line in trained]
        losses = [line["loss"] for line in trained]
        loss.plot(steps, losses, color=color, alpha=0.3, linewidth=1, label="training, each step")
        window = max(1, len(steps) // 20)
        if window > 1:
            mean = smooth(losses, window)
            loss.plot(steps, mean, color=color, linewidth=2, label="training, running mean")
        rate.plot(steps, [line["lr"] for line in trained], color=color, linewidth=1.5)
    draw_points(loss, lines, "loss", color)


def draw_points(axes: Any, lines: Sequence[dict[str, Any]], name: str, color: str, split: str = "eval") -> None:
    """Draw what was measured at single steps, on held-out examples for one."""
    found = [line for line in lines if line["split"] == split and name in line]
    if found:
        points = [line["step"] for line in found], [line[name] for line in found]
        style = {"color": color, "marker": "o", "markeredgecolor": "white", "linestyle": "--", "linewidth": 1}
        axes.plot(*points, **style, markersize=7, zorder=3, label="held out")


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
