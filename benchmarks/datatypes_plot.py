"""The paper's Figure 3 for one model: what is lost against bits per weight, a line for each data type over blocks."""

from pathlib import Path
from typing import Any

COLOURS = {"int4": "C3", "fp4-e2m1": "C1", "fp4-e3m0": "C5", "fp4": "C4", "nf4": "C0"}
ERROR = "relative error of the weights"


def draw(rows: list[dict[str, Any]], texts: list[str], target: Path) -> None:
    """Perplexity on the first text and relative error of the 4-bit types, and the relative error of all widths."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(4.4 * (3 if texts else 2), 4.4), layout="constrained")
    panels = list(figure.subplots(1, 3 if texts else 2, squeeze=False)[0])
    if texts:
        axes, first = panels.pop(0), texts[0]
        scored = [row for row in rows if first in row.get("corpora", {})]
        lines(axes, scored[1:], lambda row: row["corpora"][first]["perplexity"]["value"])
        dense = scored[0]["corpora"][first]["perplexity"]["value"]
        axes.axhline(dense, color="0.5", linewidth=0.8, linestyle="--")
        axes.annotate("16 bit", (1, dense), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4")
        axes.set(ylabel=f"perplexity, {first}", yscale="log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(FuncFormatter(lambda value, place: f"{value:g}"))
    lines(panels[0], rows[1:], lambda row: row["relative_error"])
    panels[0].set(ylabel=ERROR)
    widths(panels[1], [row for row in rows[1:] if row["block_size"] == 64 and not row["double_quant"]])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(target, dpi=120)


def lines(axes: Any, rows: list[dict[str, Any]], value: Any) -> None:
    """A line for each 4-bit type, and a dashed one with double quantization; the more bits, the smaller the block."""
    for name, colour in COLOURS.items():
        for double_quant in (False, True):
            chosen = [row for row in rows if row["datatype"] == name and row["double_quant"] == double_quant]
            if chosen:
                label, style = (f"{name}+DQ", "v--") if double_quant else (name, "o-")
                places = [row["bits_per_weight"] for row in chosen]
                axes.plot(places, [value(row) for row in chosen], style, color=colour, label=label, markersize=4)
    axes.set(xlabel="bits per weight: more, the smaller the blocks")
    axes.spines[["top", "right"]].set_visible(False)


def widths(axes: Any, rows: list[dict[str, Any]]) -> None:
    """The types in blocks of 64, whatever the bits of a code."""
    for row in rows:
        x, y = row["bits_per_weight"], row["relative_error"]
        axes.plot(x, y, "o", color=COLOURS.get(row["datatype"], "0.4"), markersize=5)
        if row["datatype"] not in COLOURS:  # those lie close together, and have their colours
            axes.annotate(row["datatype"], (x, y), xytext=(6, 3), textcoords="offset points")
    axes.set(xlabel="bits per weight (blocks of 64)", ylabel=ERROR, yscale="log", xlim=(2, 9.5))
    axes.spines[["top", "right"]].set_visible(False)
