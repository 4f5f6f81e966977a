"""Tables of a benchmark that has no verb of its own: shown as lines, and kept as JSON with where they come from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance


def finish(benchmark: str, tables: Mapping[str, Sequence[Mapping[str, Any]]], out: Path | None) -> None:
    """Print every row, and write the file if one is wanted."""
    for rows in tables.values():
        for row in rows:
            shown = {name: f"{value:,.4g}" if isinstance(value, float) else value for name, value in row.items()}
            print("  ".join(f"{name} {value}" for name, value in shown.items()))
    if out:
        result = {"benchmark": benchmark, **provenance("cpu"), **tables}
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
