"""`qlora sweep FILE`: work off a grid of runs, alone or as one of many workers, and report what is there.

A worker goes through the cells, runs each that nobody has and that is not done, and goes through them again until
nothing is left for it: a cell whose worker was killed meanwhile is taken up too. It does not wait for cells that others
are running; it says how many, and the last worker to end finds all of them done and writes the whole report.
"""

import multiprocessing
import os
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from models.errors import ConfigError, Refusal
from train.config import listed
from train.sweep.cells import changed, failure, is_left, run_cell, state
from train.sweep.grid import Cell, Sweep, read_sweep
from train.sweep.report import write_report

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Run every cell of a grid, each in a directory of its own, and make a table and plots of them."""

    file: Positional[str]
    """The grid: a TOML file with settings, a table [grid] of lists, and out."""
    seeds: int | None = None
    """Run each grid point with so many seeds; by default as the file says."""
    model: str | None = None
    """The checkpoint to start from, in place of the file's."""
    out: str | None = None
    """The sweep's directory, in place of the file's."""
    workers: int = 1
    """Processes at once; more can be started elsewhere on the same file system."""
    only: tuple[str, ...] = ()
    """Run only these cells."""
    retry: bool = False
    """Run cells again that have failed."""
    print: bool = False
    """Print one command per cell that is not done, for a scheduler, and run nothing."""
    table: bool = False
    """Make the report from what is there, and run nothing."""
    quiet: bool = False
    """Show no progress within cells."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        for name in ("seeds", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.print and self.table:
            raise ValueError("print and table exclude each other: one makes commands, the other a report")


class FailedCells(Refusal):
    """Some cells failed; the others went on."""

    exit_code = 1


def command(options: SweepOptions, console: "Console") -> dict[str, Any]:
    sweep = read_sweep(Path(options.file), options.seeds, options.model, options.out)
    cells = chosen(sweep, options.only)
    if options.print:
        commands = [shell_command(options, cell) for cell in cells if state(sweep, cell) != "done"]
        for line in commands:
            console.print(line, markup=False, soft_wrap=True)
        return {"commands": commands}
    code = 0
    if not options.table:
        check_unchanged(sweep)
        code = work_together(options) if options.workers > 1 else work(sweep, cells, options, console)
        code = code if any(is_left(sweep, cell) for cell in cells) else 0  # others have done what one could not
    return concluded(sweep, cells, code, console)


def concluded(sweep: Sweep, cells: Sequence[Cell], code: int, console: "Console") -> dict[str, Any]:
    """Write the report and say how it stands; an exit code from a signal goes on, and failures become one."""
    from train.sweep.plots import plot_sweep

    report = write_report(sweep)
    report["plots"] = [str(path) for path in plot_sweep(sweep)]
    missing = report["cells"] - report["done"] - len(report["failed"])
    console.print(f"{report['done']} of {report['cells']} cells are done, {missing} missing", highlight=False)
    console.print(f"report: {sweep.out / 'sweep.md'}", markup=False, soft_wrap=True)
    if code:
        raise SystemExit(code)
    failed = [(cell, failure(sweep, cell)) for cell in cells if state(sweep, cell) == "failed"]
    if failed:
        reasons = "".join(f"\n  {cell.name}: {why.reason}" for cell, why in failed)
        error = FailedCells(f"{len(failed)} of {len(cells)} cells failed (--retry runs them again):{reasons}")
        codes = {why.exit_code for _, why in failed}
        error.exit_code = codes.pop() if len(codes) == 1 else FailedCells.exit_code
        error.report = report
        raise error
    return report


def chosen(sweep: Sweep, only: Sequence[str]) -> list[Cell]:
    """Give the cells of these names; all where none is named."""
    known = {cell.name: cell for cell in sweep.cells}
    problems = []
    for name in only:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"--only: {sweep.path} has no cell {name!r}{hint}")
    if problems:
        raise ConfigError(listed(problems))
    return [known[name] for name in only] if only else list(sweep.cells)


def check_unchanged(sweep: Sweep) -> None:
    """Refuse to mix runs of one file with runs of another."""
    problems = [
        f"cell {cell.name} was begun with other settings: {other}; give another out, or remove its directory"
        for cell in sweep.cells
        if (other := changed(sweep, cell))
    ]
    if problems:
        raise ConfigError(listed(problems))


def shell_command(options: SweepOptions, cell: Cell) -> str:
    """Give the command that runs one cell, however far it is, and never twice at once."""
    words = ["qlora", "sweep", options.file, "--only", cell.name]
    for name in ("seeds", "model", "out"):
        given = getattr(options, name)
        words += [] if given is None else [f"--{name}", str(given)]
    words += ["--retry"] if options.retry else []
    return shlex.join([*words, "--quiet"] if options.quiet else words)


# Workers


def work(sweep: Sweep, cells: Sequence[Cell], options: SweepOptions, console: "Console") -> int:
    """Run what is left of the cells, one after the other; the exit code is 0, or says which signal stopped it."""
    tried: set[str] = set()
    elsewhere = -1
    while elsewhere:
        left = [cell for cell in cells if cell.name not in tried and is_left(sweep, cell, options.retry)]
        elsewhere, ran = 0, False
        for cell in left:
            outcome = run_cell(sweep, cell, quiet=options.quiet, retry=options.retry)
            if outcome.status == "elsewhere":
                elsewhere += 1
                continue
            ran = True
            tried.add(cell.name)
            if outcome.status == "settled":
                continue
            console.print(f"{cell.name}: {outcome.status}", markup=False, highlight=False, soft_wrap=True)
            if outcome.signal is not None:
                return 128 + outcome.signal
        if elsewhere and not ran:
            are = "cell is" if elsewhere == 1 else "cells are"
            console.print(f"{elsewhere} {are} being run by others", highlight=False)
            break
    return 0


def work_together(options: SweepOptions) -> int:
    """Start workers and wait for them; a signal to this process is passed on to each, and is the exit code."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    processes = [context.Process(target=worker, args=(options,)) for _ in range(options.workers)]
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for process in processes:
            if not received:
                process.start()
        for process in processes:
            if process.pid is not None:
                process.join()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    codes = [128 + number for number in received] + [process.exitcode or 0 for process in processes]
    ended = next((code for code in codes if code), 0)
    return ended if ended >= 0 else 128 - ended  # a negative one is the signal that killed a worker


def worker(options: SweepOptions) -> None:
    """Be one of several: in a group of its own, so that Ctrl-C reaches it once, through the one who started it."""
    from rich.console import Console

    os.setpgrp()
    sweep = read_sweep(Path(options.file), options.seeds, options.model, options.out)
    quiet = replace(options, quiet=True)
    raise SystemExit(work(sweep, chosen(sweep, options.only), quiet, Console(stderr=True)))
