"""What a sweep came to: a row per grid point, over its seeds, as Markdown, CSV and JSON.

Of each cell that is done it takes the last line on held-out examples. A mean over seeds has the 95 % interval of
Student's t, the right one for few seeds whose spread is not known: mean ± t(0.975, n - 1) s / sqrt(n). One seed has no
interval. Cells that are not done yet are counted and left out.
"""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from models.files import write_whole
from train.plot import measured
from train.run import read_metrics
from train.sweep.cells import failure, settings, state
from train.sweep.grid import Cell, Sweep
from train.sweep.names import short_keys, text_of


@dataclass(frozen=True)
class Interval:
    """A mean over seeds; `half` is half of its 95 % interval, None for a single seed."""

    mean: float
    half: float | None
    n: int


@dataclass(frozen=True)
class Row:
    """A grid point."""

    point: dict[str, Any]
    """Every varied setting by its dotted key."""
    done: int
    cells: int
    measures: dict[str, Interval]
    """Held-out loss, and what else was measured."""
    steps: int | None
    """The most over the seeds, as is the memory."""
    peak_memory: int | None
    """In bytes."""
    seconds: float | None
    """Spent in steps; the mean over the seeds."""


def write_report(sweep: Sweep) -> dict[str, Any]:
    """Write OUT/sweep.md, .csv and .json from what is there, and give what the last of them holds."""
    rows = report_rows(sweep)
    counts = Counter(state(sweep, cell) for cell in sweep.cells)
    failed = [{"cell": cell.name, **asdict(failure(sweep, cell))} for cell in failed_cells(sweep)]
    report = {
        "sweep": str(sweep.path),
        "out": str(sweep.out),
        "seeds": list(sweep.seeds),
        "cells": len(sweep.cells),
        "done": counts["done"],
        "failed": failed,
        "rows": [asdict(row) for row in rows],
    }
    write_whole(sweep.out / "sweep.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_whole(sweep.out / "sweep.csv", to_csv(sweep, rows))
    write_whole(sweep.out / "sweep.md", to_markdown(sweep, rows, failed))
    return report


def failed_cells(sweep: Sweep) -> list[Cell]:
    return [cell for cell in sweep.cells if state(sweep, cell) == "failed"]


def report_rows(sweep: Sweep) -> list[Row]:
    """Give a row per grid point, in the file's order."""
    rows = []
    for _, cells in sweep.points():
        done = [sweep.out / cell.name for cell in cells if state(sweep, cell) == "done"]
        endings = [ending(directory) for directory in done]
        timings = [read_metrics(directory, "timing.jsonl") for directory in done]
        steps = [max((line["step"] for line in read_metrics(directory)), default=0) for directory in done]
        everything = settings(cells[0].config)
        rows.append(
            Row(
                point={key: everything[key] for key in sweep.keys},
                done=len(done),
                cells=len(cells),
                measures={
                    name: interval([values[name] for values in endings if name in values])
                    for name in dict.fromkeys(name for values in endings for name in values)
                },
                steps=max(steps, default=None),
                peak_memory=max((line["peak_memory"] for lines in timings for line in lines), default=None),
                seconds=fmean(sum(line["seconds"] for line in lines) for lines in timings) if timings else None,
            )
        )
    return rows


def ending(directory: Path) -> dict[str, float]:
    """What a run measured last on held-out examples: the loss, and what else there is."""
    lines = [line for line in read_metrics(directory) if line["split"] == "eval"]
    return {name: lines[-1][name] for name in ("loss", *measured(lines[-1:]))} if lines else {}


def interval(values: Sequence[float]) -> Interval:
    """Give the mean with its 95 % interval.

    >>> found = interval([1.0, 2.0, 3.0])
    >>> found.mean, round(found.half, 4)  # t(0.975, 2) is 4.3027, the standard error 1 / sqrt(3)
    (2.0, 2.4841)
    """
    from scipy.stats import t

    n = len(values)
    half = float(t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n) if n > 1 else None
    return Interval(fmean(values), half, n)


# Tables


def to_csv(sweep: Sweep, rows: Sequence[Row]) -> str:
    """Give the rows for a spreadsheet: numbers in full, the varied settings under their dotted keys."""
    names = all_measures(rows)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    parts = [f"{name}_{part}" for name in names for part in ("mean", "low", "high", "n")]
    writer.writerow([*sweep.keys, "done", "cells", *parts, "steps", "peak_memory", "seconds"])
    for row in rows:
        found = [part for name in names for part in in_parts(row.measures.get(name))]
        point = [text_of(value) if value is not None else None for value in row.point.values()]
        writer.writerow([*point, row.done, row.cells, *found, row.steps, row.peak_memory, row.seconds])
    return table.getvalue()


def in_parts(found: Interval | None) -> list[float | None]:
    """Mean, both ends of its interval, and how many there are."""
    if found is None:
        return [None] * 4
    if found.half is None:
        return [found.mean, None, None, found.n]
    return [found.mean, found.mean - found.half, found.mean + found.half, found.n]


def to_markdown(sweep: Sweep, rows: Sequence[Row], failed: Sequence[dict[str, Any]]) -> str:
    """Give the rows for people, with what is missing."""
    missing = sum(row.cells - row.done for row in rows) - len(failed)
    counts = f"{sum(row.done for row in rows)} of {len(sweep.cells)} cells are done"
    counts += f", {len(failed)} failed" if failed else ""
    counts += f", {missing} {'is' if missing == 1 else 'are'} missing" if missing else ""
    short = short_keys(sweep.keys)
    names = all_measures(rows)
    columns = [*(short[key] for key in sweep.keys), "seeds", *(f"held-out {name}" for name in names)]
    columns += ["steps", "peak memory (GiB)", "seconds"]
    lines = [
        f"# {sweep.path.stem}",
        "",
        f"{counts}. Means over the seeds ± half of the 95 % interval (Student's t); seconds are those in steps.",
        "",
        in_row(columns),
        in_row(["---:"] * len(columns)),
        *(in_row(shown(row, names)) for row in rows),
    ]
    if failed:
        lines += ["", "Failed:", "", *(f"- `{each['cell']}`: {each['reason']}" for each in failed)]
    return "\n".join(lines) + "\n"


def shown(row: Row, names: Sequence[str]) -> list[str]:
    """Give a row's fields as text."""
    point = ["–" if value is None else text_of(value) for value in row.point.values()]
    seeds = str(row.done) if row.done == row.cells else f"{row.done} of {row.cells}"
    measures = [with_interval(row.measures.get(name)) for name in names]
    if row.steps is None or row.peak_memory is None or row.seconds is None:
        return [*point, seeds, *measures, "–", "–", "–"]
    return [*point, seeds, *measures, str(row.steps), f"{row.peak_memory / 2**30:.2f}", f"{row.seconds:.1f}"]


def with_interval(found: Interval | None) -> str:
    if found is None:
        return "–"
    return f"{found.mean:.4f}" + ("" if found.half is None else f" ± {found.half:.4f}")


def all_measures(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.measures))


def in_row(fields: Sequence[str]) -> str:
    return f"| {' | '.join(field.replace('|', chr(92) + '|') for field in fields)} |"
