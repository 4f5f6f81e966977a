"""Everything that wants measuring on a GPU lent for an hour, by one command that needs little installed.

`python -m benchmarks.device_run --out DIR [--commit HASH]` checks every operator against float64, then measures
`kernels`, `training`, `load`, `generate`, `memory`, `updates`, `planner` (what is planned beside what is measured),
`sharing` (FSDP2 with one process) and, on a GPU, what paging does, and writes one JSON file each into DIR. A part that
fails leaves its traceback in its file and the next one starts all the same; the exit code then is 1. `--only NAME...`
does some of them, for instance beside one another where none of them is timed. It works on a CPU too, for testing it:
`--quick` takes sizes of no interest.
"""

import argparse
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    correctness,
    figure6,
    generation,
    kernels,
    load,
    memory,
    paged,
    planner,
    roofline,
    sharing,
    training,
    updates,
)
from benchmarks.provenance import provenance

QUICK_SHAPES = ((3, 64, 128),)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the JSON files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="what the tree is, where git cannot say")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small sizes and one repeat")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these parts alone")
    options = parser.parse_args(argv)
    todo = parts(options.device, 1 if options.quick else options.repeats, options.quick)
    if unknown := [name for name in options.only or () if name not in todo]:
        parser.error(f"the parts are {', '.join(todo)}, and {unknown[0]!r} is none of them")
    options.out.mkdir(parents=True, exist_ok=True)
    about = provenance(options.device, options.commit)
    right = True
    for name, part in todo.items():
        if options.only and name not in options.only:
            continue
        start = time.perf_counter()
        result = outcome(part)
        result |= {"benchmark": name, **about, "took_seconds": round(time.perf_counter() - start, 1)}
        (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        wrong = result["failures"]
        right = right and not wrong
        print(
            f"{name}: {len(result['rows'])} rows in {result['took_seconds']} s; wrong: {wrong or 'nothing'}", flush=True
        )
    return 0 if right else 1


def parts(device: str, repeats: int, quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is run, in this order."""
    shapes = QUICK_SHAPES if quick else correctness.shapes_for(device)
    sizes, tokens, lora_tokens = (((64, 128),), (1, 3), 8) if quick else (None, None, None)
    setting, writing = training.Setting(device=device), generation.Setting(device=device)
    loaded, small, large = load.RANDOM, figure6.SMALL, tuple(figure6.FIGURE_6)
    if quick:
        loaded = training.TINY
        setting = dataclasses.replace(setting, config=loaded, batch=2, tokens=16)
        writing, small, large = dataclasses.replace(writing, config=loaded, new=4), (), ()
    limits = cache(lambda: roofline.limits(device, repeats))

    def checked() -> dict[str, Any]:
        rows = correctness.check(device, shapes)
        return {"rows": rows, "failures": correctness.failures(rows)}

    def measured() -> dict[str, Any]:
        rows = kernels.measure(device, sizes, repeats, tokens, lora_tokens, limits())
        return {"limits": asdict(limits()), "rows": rows, "failures": kernels.failures(rows)}

    def trained() -> dict[str, Any]:
        rows = training.measure(setting, repeats=repeats, limits=limits())
        return {"limits": asdict(limits()), "rows": rows, "setting": training.described(setting), "failures": []}

    def loading() -> dict[str, Any]:
        found = load.measure(device, None, repeats, limits(), loaded)
        return {"limits": asdict(limits()), **found, "failures": []}

    def written() -> dict[str, Any]:
        rows = generation.measure(writing, repeats, limits())
        return {"limits": asdict(limits()), "rows": rows, "setting": generation.described(writing), "failures": []}

    def remembered() -> dict[str, Any]:
        return {"rows": memory.measure(setting), "figure6": figure6.measure(device, small, large), "failures": []}

    def planned() -> dict[str, Any]:
        rows = planner.measure(device, planner.QUICK if quick else planner.JOBS)
        return {"rows": rows, "failures": planner.failures(rows)}

    def shared() -> dict[str, Any]:
        rows = sharing.measure(setting, repeats)
        return {"rows": rows, "failures": sharing.failures(rows)}

    return {
        "correctness": checked,
        "kernels": measured,
        "updates": lambda: {
            "rows": updates.measure(device, repeats, {"few": [300]} if quick else None),
            "failures": [],
        },
        "training": trained,
        "load": loading,
        "generate": written,
        "memory": remembered,
        "planner": planned,
        "sharing": shared,
        **({"paged": lambda: paged.measure(device, repeats)} if device == "cuda" else {}),
    }


def outcome(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a part gives, or how it failed: the parts after it are worth having all the same."""
    try:
        return part()
    except Exception:
        return {"rows": [], "failures": [traceback.format_exc()]}


if __name__ == "__main__":
    sys.exit(main())
