"""A sweep in pictures: each measure over each setting that is a number, and the loss while training.

A picture of a measure has a line for every combination of the other settings, its points with 95 % intervals over
seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from eval.figures import save
from train.plot import explain, smooth
from train.run import read_metrics
from train.sweep.cells import state
from train.sweep.grid import Sweep
from train.sweep.names import cell_name, short_keys, text_of
from train.sweep.report import Row, all_measures, report_rows

COLOURS = 10  # as many as matplotlib's cycle has; more lines than that take a scale of colours


def plot_sweep(sweep: Sweep) -> list[Path]:
    """Draw what is done into OUT/plots; nothing while nothing is."""
    rows = [row for row in report_rows(sweep) if row.done]
    if not rows:
        return []
    files = plot_curves(sweep, sweep.out / "plots" / "loss.png")
    short = short_keys(sweep.keys)
    for key in sweep.keys:
        if all_measures(rows) and len(numbers(rows, key)) > 1:
            files += plot_over(rows, key, short, sweep.out / "plots" / f"over-{short[key]}.png")
    return files


def plot_over(rows: Sequence[Row], key: str, short: dict[str, str], target: Path) -> list[Path]:
    """Draw every measure over one setting."""
    from matplotlib.figure import Figure

    names = all_measures(rows)
    figure = Figure(figsize=(8, 4 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    series: dict[str, list[Row]] = {}
    for row in rows:
        if is_number(row.point[key]):
            others = {short[other]: value for other, value in row.point.items() if other != key}
            series.setdefault(label_of(others), []).append(row)
    for axes, name in zip(panels, names, strict=True):
        for index, group in enumerate(series.values()):
            there = sorted((row for row in group if name in row.measures), key=lambda row: row.point[key])
            found = [row.measures[name] for row in there]
            x, y = [row.point[key] for row in there], [each.mean for each in found]
            errors = [each.half or 0 for each in found]
            axes.errorbar(x, y, yerr=errors, color=colour(index, len(series)), marker="o", capsize=4)
        axes.set(ylabel=f"held-out {name}" + (" (nats per label token)" if name == "loss" else ""))
        tidy(axes)
    values = numbers(rows, key)
    if min(values) > 0 and max(values) >= 10 * min(values):
        panels[-1].set_xscale("log")
    panels[-1].set_xticks(values, [text_of(value) for value in values])
    panels[-1].minorticks_off()
    panels[-1].set(xlabel=key)
    explain(figure, panels[0], colours(list(series)) if len(series) > 1 else {})
    return save(figure, target)


def plot_curves(sweep: Sweep, target: Path) -> list[Path]:
    """Draw each grid point's loss over the steps, as means over its seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    short = short_keys(sweep.keys)
    points = [
        (label_of({short[key]: value for key, value in point.items()}), done)
        for point, cells in sweep.points()
        if (done := [read_metrics(sweep.out / cell.name) for cell in cells if state(sweep, cell) == "done"])
    ]
    for index, (_, runs) in enumerate(points):
        chosen = colour(index, len(points))
        trained, held_out = by_step(runs, "train"), by_step(runs, "eval")
        means = smooth([fmean(values) for values in trained.values()], max(1, len(trained) // 20)) if trained else []
        axes.plot(list(trained), means, color=chosen, alpha=0.5, label="training, running mean")
        style = {"color": chosen, "marker": "o", "markeredgecolor": "white", "linestyle": "--"}
        axes.plot(list(held_out), [fmean(values) for values in held_out.values()], label="held out", **style)
    axes.set(
        xlabel="optimizer step", ylabel="loss per label token (nats)", title=f"{sweep.path.stem}: means over seeds"
    )
    tidy(axes)
    explain(figure, axes, colours([label for label, _ in points]))
    return save(figure, target)


def by_step(runs: Sequence[Sequence[dict[str, Any]]], split: str) -> dict[int, list[float]]:
    """Give the losses of the runs at the steps that all of them have."""
    each = [{line["step"]: line["loss"] for line in run if line["split"] == split} for run in runs]
    return {step: [run[step] for run in each] for step in each[0] if all(step in run for run in each)}


def numbers(rows: Sequence[Row], key: str) -> list[int | float]:
    """The different numbers that a setting has."""
    return sorted({row.point[key] for row in rows if is_number(row.point[key])})


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def label_of(point: dict[str, Any]) -> str:
    return cell_name(point).replace(",", ", ")


def colours(labels: Sequence[str]) -> dict[str, Any]:
    return {label: colour(index, len(labels)) for index, label in enumerate(labels)}


def colour(index: int, count: int) -> Any:
    """The colour of one line of so many."""
    from matplotlib import colormaps

    return f"C{index}" if count <= COLOURS else colormaps["viridis"](index / (count - 1))


def tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
