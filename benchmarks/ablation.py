"""`qlora bench ablation`: what sweeps came to, each setting held against the sweep's first one seed by seed.

    qlora sweep benchmarks/sweeps/methods.toml --model DIRECTORY --out runs/methods
    qlora bench ablation --data methods=benchmarks/sweeps/methods.toml --work runs --out results/ablation.json

The paper judges by RougeL (Figures 2 and 4), here it is the loss on examples held out. A sweep with `vary_data` has
for each seed other examples held out, and learns the others in another order. So a mean over seeds varies with the
data, and a difference within a seed does not: the second is what tells settings apart. Cells that are not done are
left out.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.corpora import named_files
from models.errors import ConfigError, DataError
from models.readers import SafetensorsReader
from train.sweep.cells import state
from train.sweep.grid import Cell, Sweep, read_sweep
from train.sweep.names import cell_name, short_keys
from train.sweep.report import ending, interval

if TYPE_CHECKING:
    from rich.console import Console


def bench(options: Any, console: "Console") -> dict[str, Any]:
    from rich.table import Table

    sweeps = {}
    for name, path in named_files(options.data).items():
        out = None if options.work is None else str(Path(options.work) / path.stem)
        sweeps[name] = summary(read_sweep(path, model=options.model, out=out))
    if not sweeps:
        raise ConfigError("data: which sweeps? Give NAME=FILE.toml, of those that `qlora sweep` has run")
    for name, found in sweeps.items():
        table = Table("", "trained", "seeds", "held-out loss", "over the first")
        for row in found["rows"]:
            table.add_row(row["setting"], f"{row['trained']:,}", str(len(row["seeds"])), *shown(row))
        console.print(f"{name}: 95 % intervals over seeds; {found['done']} of {found['cells']} cells are done")
        console.print(table)
    if options.plot:
        draw(sweeps, options.plot)
    return {"sweeps": sweeps}


def summary(sweep: Sweep) -> dict[str, Any]:
    """A row for each grid point of which a cell is done."""
    short, rows = short_keys(sweep.keys), []
    reference: dict[int, float] = {}
    for point, cells in sweep.points():
        done = {cell.config.seed: sweep.out / cell.name for cell in cells if state(sweep, cell) == "done"}
        if not done:
            continue
        losses = {seed: ending(run)["loss"] for seed, run in done.items()}
        reference = reference or losses
        paired = [losses[seed] - reference[seed] for seed in losses if seed in reference]
        rows.append(
            {
                "setting": cell_name({short[key]: value for key, value in point.items()}).replace(",", ", "),
                "point": {key: list(v) if isinstance(v, tuple) else v for key, v in point.items()},
                "trained": trained_numbers(next(iter(done.values()))),
                "seeds": list(losses),
                "losses": list(losses.values()),
                "loss": asdict(interval(list(losses.values()))),
                "over_reference": asdict(interval(paired)) if paired else None,
            }
        )
    if not rows:
        raise DataError(f"{sweep.path}: none of its cells is done in {sweep.out}; `qlora sweep` runs them")
    cells: Sequence[Cell] = sweep.cells
    config = cells[0].config
    return {
        "file": sweep.path.name,
        "model": Path(config.model).name,
        "data": Path(config.data.path).name,
        "steps": config.max_steps,
        "cells": len(cells),
        "done": sum(len(row["seeds"]) for row in rows),
        "rows": rows,
    }


def trained_numbers(run: Path) -> int:
    """How many numbers a run's adapter holds."""
    return sum(
        math.prod(shape) for shape in SafetensorsReader(run / "adapter" / "adapter_model.safetensors").shapes.values()
    )


def shown(row: dict[str, Any]) -> list[str]:
    """A row's two intervals as text; a single seed has none."""
    parts = [row["loss"], row["over_reference"]]
    return ["" if p is None else f"{p['mean']:.4f}" + (f" ± {p['half']:.4f}" if p["half"] else "") for p in parts]


def draw(sweeps: dict[str, dict[str, Any]], target: Path) -> None:
    """A panel for each sweep: by how much each setting's held-out loss is over the first one's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(sweeps), 5.2), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps.items(), strict=True):
        rows = [row for row in found["rows"] if row["over_reference"]]
        points(axes, rows, rows[0], "over_reference")
        axes.set(
            title=f"{name}: {found['model']}, {found['steps']} steps", ylabel="held-out loss over the first (nats)"
        )
    figure.savefig(target, dpi=120)


def points(axes: Any, rows: Sequence[dict[str, Any]], reference: dict[str, Any], what: str = "loss") -> None:
    """A point with its interval for each row, and a line through the one that they are held against."""
    means, halves = [row[what]["mean"] for row in rows], [row[what]["half"] or 0 for row in rows]
    axes.errorbar(range(len(rows)), means, yerr=halves, fmt="o", capsize=4)
    axes.axhline(reference[what]["mean"], color="0.6", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(rows)), [row["setting"] for row in rows], rotation=60, ha="right", fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
