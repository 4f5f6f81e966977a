"""What a machine can do at most, and how near an operator comes to that: the roofline (Williams et al. 2009).

Two limits are measured in the same run as the operators: the bytes that a large copy reads and writes in a second,
and the operations of a large square product. A work that cannot but do F operations and move D bytes takes at least
max(F / peak, D / bandwidth) seconds; its share of the roofline is that bound over the time it took. By its intensity,
F / D, the bound is an operator's place below a roof: a slope while memory is what is waited for, then level.

A share above 1 is possible: what fits into a CPU's cache is read faster than a copy of what does not, and a copy on a
CPU also brings in what it will overwrite, which is not counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.tables import show
from benchmarks.timing import copy_bandwidth, product_speed

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

NEAR = 1.5  # points whose places differ by less than this factor are labelled together
COLOURS = {"ours": "C0", "bitsandbytes": "C1", "bitsandbytes_repacked": "C3", "peer": "C1", "dense": "C2"}


@dataclass(frozen=True)
class Limits:
    """What was measured of a machine."""

    bandwidth: float
    """Bytes in a second, read and written, of a large copy."""
    peak: Mapping[str, float]
    """Operations in a second of a large product, by dtype."""


@dataclass(frozen=True)
class Work:
    """What a call cannot but do."""

    operations: int
    """Multiplications and additions, two for each term of a product; 0 where another figure is what counts."""
    nbytes: int
    """Bytes read and written, each once."""


def limits(device: str, repeats: int = 5) -> Limits:
    """Measure this machine: the fastest of some rounds, since a limit is what nothing exceeds."""
    peak = {name: product_speed(device, getattr(torch, name), repeats) for name in ("bfloat16", "float32")}
    return Limits(copy_bandwidth(device, repeats), peak)


def bound(work: Work, limits: Limits, dtype: str = "bfloat16") -> float:
    """Seconds that the work takes at least.

    >>> bound(Work(operations=100, nbytes=10), Limits(5.0, {"bfloat16": 10.0}))
    10.0
    >>> bound(Work(operations=10, nbytes=10), Limits(5.0, {"bfloat16": 10.0}))
    2.0
    """
    return max(work.operations / limits.peak[dtype], work.nbytes / limits.bandwidth)


def placed(work: Work, seconds: float, limits: Limits, dtype: str = "bfloat16") -> dict[str, float]:
    """An operator's place under the roof: what it attains, its intensity, and its share of the roofline."""
    return {
        "operations": work.operations,
        "bytes": work.nbytes,
        "intensity": work.operations / work.nbytes if work.nbytes else float("inf"),
        "flop_s": work.operations / seconds,
        "bytes_s": work.nbytes / seconds,
        "share": bound(work, limits, dtype) / seconds,
    }


def all_placed(
    works: Mapping[str, Work], seconds: Mapping[str, float], limits: Limits | None
) -> dict[str, dict[str, float]]:
    """The place of every contestant whose work is known; without limits, none."""
    if limits is None:
        return {}
    return {name: placed(works[name], took, limits) for name, took in seconds.items() if name in works}


def shares(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For a table: what each contestant attains, and its share of the roofline."""
    told = []
    for row in rows:
        places = row.get("roofline", {})
        ours = places.get("ours", {})
        attained = {"GFLOP/s": ours["flop_s"] / 1e9, "GB/s": ours["bytes_s"] / 1e9} if ours else {}
        intensity = {"FLOP/byte": ours["intensity"]} if ours.get("operations") else {}
        told.append(intensity | attained | {f"{name}_of_roof": place["share"] for name, place in places.items()})
    return told


ATTAINED = ["FLOP/byte", "GFLOP/s", "GB/s"]
SHARES = [f"{name}_of_roof" for name in ("ours", "bitsandbytes", "bitsandbytes_repacked", "dense")]


def show_shares(console: "Console", names: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """What ours attains, and everyone's share of the roofline."""
    told = shares(rows)
    show(console, names, told, ATTAINED)
    show(console, names, told, SHARES)


def draw(rows: Sequence[Mapping[str, Any]], limits: Limits, target: Path, dtype: str = "bfloat16") -> "Figure":
    """A point for each row and contestant below the roof of the machine, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    points = [
        (name, row["case"], place)
        for row in rows
        for name, place in row.get("roofline", {}).items()
        if place["operations"]
    ]
    peak, bandwidth = limits.peak[dtype], limits.bandwidth
    intensities = [place["intensity"] for _, _, place in points] + [peak / bandwidth]
    low, high = min(intensities) / 3, max(intensities) * 3
    ridge = peak / bandwidth
    axes.plot([low, ridge, high], [low * bandwidth, peak, peak], color="0.3", linewidth=1.2)
    axes.text(low * 1.1, low * bandwidth * 3, f"copy: {bandwidth / 1e9:.3g} GB/s", fontsize=8)
    axes.text(high, peak * 1.08, f"{dtype} product: {peak / 1e12:.3g} TFLOP/s", fontsize=8, ha="right")
    for name in dict.fromkeys(name for name, _, _ in points):
        places = [place for found, _, place in points if found == name]
        axes.plot(
            [place["intensity"] for place in places],
            [place["flop_s"] for place in places],
            "o",
            color=COLOURS.get(name, "C4"),
            markersize=5,
            label=name.replace("_", ", "),
            alpha=0.8,
        )
    for text, x, y in labels([(case, place) for name, case, place in points if name == "ours"]):
        right = x * x > low * high  # in that half of the plot there is more room on the left
        side: dict[str, Any] = {"ha": "right", "xytext": (-6, -3)} if right else {"ha": "left", "xytext": (6, -3)}
        axes.annotate(text, (x, y), textcoords="offset points", fontsize=6, color="0.3", va="top", **side)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(None, peak * 1.6))
    axes.set(xlabel="operations for each byte that must be moved", ylabel="operations in a second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(target, dpi=120)
    return figure


def labels(places: Sequence[tuple[str, Mapping[str, float]]]) -> list[tuple[str, float, float]]:
    """A text for each point, with its place; points too close for two texts share one, a line each.

    >>> labels([("a", {"intensity": 1.0, "flop_s": 9.0}), ("b", {"intensity": 1.1, "flop_s": 9.1})])
    [('a\\nb', 1.0, 9.0)]
    """
    told: list[tuple[str, float, float]] = []
    for case, place in places:
        x, y = place["intensity"], place["flop_s"]
        near = [n for n, (_, a, b) in enumerate(told) if 1 / NEAR < x / a < NEAR and 1 / NEAR < y / b < NEAR]
        if near:
            text, a, b = told[near[0]]
            told[near[0]] = (f"{text}\n{case}", a, b)
        else:
            told.append((case, x, y))
    return told
