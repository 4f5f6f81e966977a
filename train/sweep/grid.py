"""What a sweep file says: settings that all runs share, settings that are varied, and the runs that follow.

    preset = "guanaco-7b"               # bases, as for `qlora train`; `config` names files likewise
    out = "runs/rank"                   # the sweep's directory; each run has one in it
    seeds = 3                           # each grid point with as many seeds, or a list of them
    vary_data = true                    # with each seed another order of the data, and other examples held out
    model = "llama-7b"                  # whatever else a run's file may say, for all of them
    [data]
    path = "oasst1.jsonl"
    [grid]                              # every combination of these
    "lora.rank" = [8, 64]
    "optimizer.learning_rate" = [1e-4, 2e-4]
    [[cells]]                           # and single combinations besides
    "lora.rank" = 256
    "optimizer.learning_rate" = 5e-5

A grid point with a seed is a cell. The seeds vary the adapters' start and dropout; which examples are held out depends
on data.seed alone, so that all cells are measured on the same ones. With `vary_data` each seed is data.seed as well:
then the spread over seeds is also that over data, and what is compared is compared seed by seed. Everything that is
wrong is listed at once.
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from models.errors import ConfigError
from train.config import finish, listed, read_sources
from train.recipe import RunConfig
from train.sweep.names import cell_name, short_keys
from train.toml import Values, all_keys, convert, load_table, read_table, supersede, toml_or_repr

Point = dict[str, Any]  # dotted key -> value

TAKEN = {"seed": "seeds says which", "out": "each cell has a directory of its own", "name": "each cell is named"}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str
    point: Point
    """What is varied, and its value here."""
    config: RunConfig


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and checked."""

    path: Path
    out: Path
    keys: tuple[str, ...]
    """What is varied, by dotted keys."""
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]

    def points(self) -> list[tuple[Point, list[Cell]]]:
        """List the grid points, each with its cells."""
        found: dict[str, tuple[Point, list[Cell]]] = {}
        for cell in self.cells:
            found.setdefault(repr(cell.point), (cell.point, []))[1].append(cell)
        return list(found.values())


OWN = ("preset", "config", "out", "seeds", "vary_data", "grid", "cells")  # keys of a sweep file that no run has


def read_sweep(path: Path, seeds: int | None = None, model: str | None = None, out: str | None = None) -> Sweep:
    """Read a sweep file; `seeds`, `model` and `out` stand over the file's."""
    table = load_table(path)
    given = {"model": model, "out": out}
    table |= {key: value for key, value in given.items() if value is not None}
    own = {key: table.pop(key) for key in OWN if key in table}
    problems: list[str] = []
    presets, files = (names(own.get(key, []), f"{path}: {key}", problems) for key in ("preset", "config"))
    values, origins, wrong = read_sources(RunConfig, presets, files)
    problems += wrong
    if table.pop("name", None) is not None:
        problems.append(f"{path}: name: {TAKEN['name']}")
    read_table(RunConfig, table, "", values, origins, str(path), problems, all_keys(RunConfig))

    points = read_points(own, path, problems)
    chosen = read_seeds(own.get("seeds", 1) if seeds is None else seeds, int(values.get("seed", 42)), path, problems)
    if not isinstance(vary_data := own.get("vary_data", False), bool):
        problems.append(f"{path}: vary_data: must be true or false, not {toml_or_repr(vary_data)}")
    out = own.get("out", f"runs/{path.stem}")
    if not (isinstance(out, str) and out):
        problems.append(f"{path}: out: must be a path, not {toml_or_repr(out)}")
        out = "."
    keys = tuple(dict.fromkeys(key for point in points for key in point))
    seeded = ("seed", "data.seed") if vary_data else ("seed",)
    cells = make_cells(
        points, chosen, seeded, Path(out), values, origins | dict.fromkeys(keys, str(path)), path, problems
    )
    if problems:
        raise ConfigError(listed(list(dict.fromkeys(problems))))
    return Sweep(path, Path(out), keys, chosen, tuple(cells))


# The file's parts


def names(given: Any, where: str, problems: list[str]) -> list[str]:
    """Give a name or a list of names as a list."""
    found = [given] if isinstance(given, str) else given
    if not (isinstance(found, list) and all(isinstance(name, str) for name in found)):
        problems.append(f"{where}: must be a name or a list of names, not {toml_or_repr(given)}")
        return []
    return found


def read_points(own: dict[str, Any], path: Path, problems: list[str]) -> list[Point]:
    """List the grid's combinations and then the single ones; what is wrong in them is noted and left out."""
    grid, singles = own.get("grid", {}), own.get("cells", [])
    if not isinstance(grid, dict):
        problems.append(f"{path}: grid: must be a table, [grid], not {toml_or_repr(grid)}")
        grid = {}
    if not (isinstance(singles, list) and all(isinstance(single, dict) for single in singles)):
        problems.append(f"{path}: cells: must be tables, [[cells]], not {toml_or_repr(singles)}")
        singles = []
    if not (grid or singles):
        problems.append(f"{path}: nothing is varied; give lists of values in [grid], or combinations in [[cells]]")

    axes: dict[str, list[Any]] = {}
    for key, given in leaves(grid):
        if not (isinstance(given, list) and given):
            problems.append(f"{path}: [grid] {key}: must be a list of values, not {toml_or_repr(given)}")
            continue
        good = [checked(key, value, f"{path}: [grid]", problems) for value in given]
        if any(good):
            axes[key] = [value for found in good for value in found]
    combinations = itertools.product(*axes.values()) if axes else []
    points = [dict(zip(axes, combination, strict=True)) for combination in combinations]
    for number, single in enumerate(singles, 1):
        where = f"{path}: [[cells]] {number}:"
        points.append({key: value for key, given in leaves(single) for value in checked(key, given, where, problems)})
    return points


def leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give the settings of a table by dotted key, whether written as `"lora.rank"` or as `lora.rank`."""
    kinds = leaf_kinds(RunConfig)
    for name, value in table.items():
        key = prefix + name.replace("-", "_")
        if isinstance(value, dict) and key not in kinds:
            yield from leaves(value, key + ".")
        else:
            yield key, value


def checked(key: str, value: Any, where: str, problems: list[str]) -> list[Any]:
    """Give a value as its field holds it, in a list; nothing, and a problem, where it cannot."""
    if key in TAKEN:
        problems.append(f"{where} {key}: {TAKEN[key]}")
        return []
    wrong: list[str] = []
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    read_table(RunConfig, nested, "", {}, {}, where, wrong, all_keys(RunConfig))
    problems += [problem.replace(f"{where}: ", f"{where} ", 1) for problem in wrong]
    return [] if wrong else [convert(value, leaf_kinds(RunConfig)[key])]


def leaf_kinds(cls: type, prefix: str = "") -> dict[str, Any]:
    """Map every dotted key that holds a value to its type."""
    found: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        inner = leaf_kinds(kind, f"{prefix}{field.name}.") if dataclasses.is_dataclass(kind) else None
        found |= {prefix + field.name: kind} if inner is None else inner  # pyrefly: ignore[bad-argument-type]
    return found


def read_seeds(given: Any, first: int, path: Path, problems: list[str]) -> tuple[int, ...]:
    """Give the seeds: those of a list, or as many as a number says, from the settings' own seed on."""
    if type(given) is int and given >= 1:
        return tuple(range(first, first + given))
    whole = isinstance(given, list) and all(type(seed) is int and seed >= 0 for seed in given)
    if whole and given and len(set(given)) == len(given):
        return tuple(given)
    problems.append(
        f"{path}: seeds: must be how many there are, or a list of different ones, not {toml_or_repr(given)}"
    )
    return (first,)


# Cells


def make_cells(
    points: Sequence[Point],
    seeds: Sequence[int],
    seeded: Sequence[str],
    out: Path,
    values: Values,
    origins: dict[str, str],
    path: Path,
    problems: list[str],
) -> list[Cell]:
    """Build and name every cell; a config that refuses names the cells that it refuses. `seeded` are a seed's keys."""
    short = short_keys(list(dict.fromkeys(key for point in points for key in point)))
    refused: dict[str, list[str]] = {}
    taken: dict[str, Point] = {}
    cells: list[Cell] = []
    for point in points:
        label = cell_name({short[key]: value for key, value in point.items()})
        if (other := taken.get(label.lower())) is not None:
            same = "is given twice" if other == point else f"has the name of another one, {other}"
            problems.append(f"{path}: the combination {label} {same}; each needs a directory of its own")
            continue
        taken[label.lower()] = point
        for seed in seeds:
            name = cell_name({short[key]: value for key, value in point.items()} | {"seed": seed})
            settings = copy.deepcopy(values)
            for key, value in {**point, **dict.fromkeys(seeded, seed), "out": str(out / name)}.items():
                put(settings, key, value)
            supersede(RunConfig, point, settings, {})
            try:
                cells.append(Cell(name, point, finish(RunConfig, settings, dict(origins), [])))
            except ConfigError as error:
                refused.setdefault(str(error), []).append(label)
                break  # another seed would be refused alike
    for text, labels in refused.items():
        where = "every cell" if len(labels) == len(points) else f"cell {', '.join(labels)}"
        lines = [line.strip() for line in text.splitlines()]
        problems += [f"{line} ({where})" for line in (lines if len(lines) == 1 else lines[1:])]
    return cells


def put(settings: Values, key: str, value: Any) -> None:
    """Set a dotted key."""
    *tables, leaf = key.split(".")
    for table in tables:
        settings = settings.setdefault(table, {})
    settings[leaf] = value
