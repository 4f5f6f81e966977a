"""A tournament in pictures: ratings with their intervals, net wins as a heat map, percentages of the reference."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.chatbot.tournament_report import Report, slugs
from eval.figures import save


def plot_report(report: Report, folder: Path) -> list[Path]:
    """Draw every tournament and every set of percentages into a folder."""
    files: list[Path] = []
    parts = slugs(report)
    for label, each in report["tournaments"].items():
        rows = each["standings"]
        title = f"{label}: Elo, with 95 % intervals over questions"
        files += plot_intervals(rows, "rating", title, "Elo", folder / f"elo-{parts[label]}", ".0f")
        files += plot_net(label, each, folder / f"net-wins-{parts[label]}")
    for label, shares in report["relative"].items():
        if shares:
            name, unit = f"{label}: relative score, with 95 % intervals", f"percent of {shares[0]['reference']}"
            files += plot_intervals(shares, "mean", name, unit, folder / f"relative-{parts[label]}", ".1f")
    return files


def plot_intervals(rows: Sequence[Report], key: str, title: str, unit: str, target: Path, digits: str) -> list[Path]:
    """A value with its interval for each system, the best on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    values = np.array([row[key] for row in rows])
    places = np.arange(len(rows))[::-1]
    ends = np.array([[max(0, row[key] - row["low"]), max(0, row["high"] - row[key])] for row in rows]).T
    axes.errorbar(values, places, xerr=ends, fmt="o", color="C0", capsize=4, markersize=6)
    for value, place in zip(values, places, strict=True):
        axes.annotate(
            format(value, digits), (value, place), (0, 6), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_yticks(places, [plain(row["system"]) for row in rows])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set(xlabel=plain(unit), title=plain(title))
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return save(figure, with_ending(target))


def plot_net(label: str, found: Report, target: Path) -> list[Path]:
    """The row's net wins against the column: blue where it wins more, red where it loses more."""
    from matplotlib.figure import Figure

    order = [each["system"] for each in found["standings"]]
    net = {(each["system"], each["against"]): each["net"] for each in found["net"]}
    values = np.array([[net.get((row, column), np.nan) for column in order] for row in order])
    size = max(4.5, 2.2 + 0.75 * len(order))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    limit = max(1.0, float(np.nanmax(np.abs(values))))
    image = axes.imshow(np.ma.masked_invalid(values), cmap="RdBu", vmin=-limit, vmax=limit)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            dark = abs(value) > 0.6 * limit
            axes.text(column, row, f"{value:+.2f}", ha="center", va="center", color="white" if dark else "black")
    names = [plain(name) for name in order]
    axes.set_xticks(range(len(order)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(order)), names)
    axes.set_title(plain(f"{label}: net wins of the row, by question"))
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.7, label="(wins - losses) / questions")
    return save(figure, with_ending(target))


def with_ending(target: Path) -> Path:
    """A name that may have dots in it, with the ending that is exchanged for each format."""
    return target.with_name(f"{target.name}.png")


def plain(text: str) -> str:
    """A text that is drawn as it is: no mathematics between dollars."""
    return text.replace("$", r"\$")
