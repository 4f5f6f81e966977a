"""Tables of results as a person reads them, and of a benchmark without a verb as JSON, with where they come from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.provenance import provenance
from benchmarks.targets import verdicts

if TYPE_CHECKING:
    from rich.console import Console


def finish(benchmark: str, tables: Mapping[str, Sequence[Mapping[str, Any]]], out: Path | None) -> None:
    """Print every row, and write the file if one is wanted."""
    for rows in tables.values():
        for row in rows:
            shown = {name: f"{value:,.4g}" if isinstance(value, float) else value for name, value in row.items()}
            print("  ".join(f"{name} {value}" for name, value in shown.items()))
    if out:
        result = {"benchmark": benchmark, **provenance("cpu"), **tables}
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def show(console: "Console", names: list[str], rows: list[dict[str, Any]], columns: list[str]) -> None:
    """A table of the figures that at least one row has."""
    from rich.table import Table

    columns = [column for column in columns if any(row.get(column) is not None for row in rows)]
    if columns:
        table = Table("", *(column.replace("_", " ") for column in columns))
        for name, row in zip(names, rows, strict=True):
            table.add_row(name, *("" if row.get(c) is None else f"{row[c]:.4g}" for c in columns))
        console.print(table)


def show_verdicts(console: "Console", names: list[str], rows: list[dict[str, Any]]) -> None:
    """A table of what is held against a target."""
    from rich.table import Table

    table = Table("", "figure", "is", "target", "")
    for name, row in zip(names, rows, strict=True):
        for verdict in verdicts(row):
            table.add_row(name, *verdict, style="red" if verdict[-1] == "missed" else None)
    if table.row_count:
        console.print(table)
