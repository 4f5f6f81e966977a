"""What every data set and size has changed in the loss on every held-out set, with intervals over seeds."""

from pathlib import Path
from typing import Any


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """A group of marks for every held-out set: a colour for what was learned, hollow for the smaller subset."""
    from matplotlib.figure import Figure

    plain, *learned = rows
    tests, names = list(plain["losses"]), list(dict.fromkeys(row["learned"] for row in learned))
    sizes = sorted({row["size"] for row in learned})
    figure = Figure(figsize=(1.9 * len(tests) + 1.5, 4), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(learned):
        colour, small = f"C{names.index(row['learned'])}", row["size"] != sizes[-1]
        places = [i + 0.8 * (number + 0.5) / len(learned) - 0.4 for i in range(len(tests))]
        losses = [row["losses"][test] for test in tests]
        values = [each["mean"] - plain["losses"][test]["mean"] for each, test in zip(losses, tests, strict=True)]
        halves = [each["half"] or 0 for each in losses]
        style: dict[str, Any] = {"color": colour, "markerfacecolor": "none" if small else colour, "capsize": 2}
        axes.errorbar(places, values, halves, fmt="o", label=f"{row['learned']}, {row['size']} examples", **style)
    axes.axhline(0, color="0.4", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(tests)), [test if test == "mean" else f"held out of\n{test}" for test in tests])
    axes.set(ylabel="loss of answers, less untrained")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(sizes), frameon=False)
    figure.savefig(target, dpi=120)
