"""The runs of a comparison: learning rates chosen first, then every kind with every seed, each asked once it is done.

All of it is sweeps (`train/sweep`), whose files and runs are in the work directory: what is done is not done again, an
interrupted run goes on, and several processes may work on one directory at once. Of a run that was asked its answers
are kept and its weights are not: a full one's take gigabytes.

A seed decides the start of adapters and of a new head, dropout, and the order of the examples.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.parity.answers import answers, tuning_loss
from benchmarks.parity.kinds import KINDS, UNTRAINED, grid, settings
from benchmarks.parity.tasks import Task
from models.files import write_whole
from train.sweep.cells import beside, failure, run_cell, state, taken
from train.sweep.command import FailedCells, check_unchanged
from train.sweep.grid import Cell, Sweep, read_sweep
from train.toml import toml_value

if TYPE_CHECKING:
    from rich.console import Console

SHARED: Mapping[str, Any] = {  # by all runs of all tasks
    "accumulation": 1,
    "gradient_checkpointing": False,
    "save_steps": 0,
    "dry_step": False,
    "lora.rank": 16,
    "lora.alpha": 16.0,
    "lora.dropout": 0.05,
    "optimizer.max_grad_norm": 1.0,
    "optimizer.schedule": "linear",
    "optimizer.warmup_ratio": 0.1,
}
RESULTS = ("adapter", "model")  # what a run leaves to be asked
PATIENCE = 5.0  # seconds between looks at what other processes are doing


@dataclass(frozen=True)
class Tuning:
    """The learning rate of a kind: what was tried, the losses that each came to, and the one with the least mean."""

    losses: Mapping[float, Sequence[float]]
    """Of every seed that rates are tried with."""

    @property
    def best(self) -> float:
        return min(self.losses, key=lambda rate: fmean(self.losses[rate]))

    @property
    def at_edge(self) -> bool:
        """Whether the best is the least or the most that was tried, so that a better one may lie beyond."""
        return len(self.losses) > 2 and self.best in (min(self.losses), max(self.losses))


@dataclass(frozen=True)
class Work:
    """Who does it: where, with what, and whom it is told."""

    device: str
    console: "Console"


def kinds_of(task: Task) -> list[str]:
    """The kinds of a task."""
    return [*KINDS, *([UNTRAINED] if task.untrained else [])]


def tune(task: Task, seeds: Sequence[int], work: Work) -> dict[str, Tuning]:
    """Try every learning rate of every kind, with each of these seeds."""
    points = {(kind, rate): point(task, kind, rate) for kind in kinds_of(task) for rate in task.rates[grid(kind)]}
    losses: dict[tuple[str, float], list[float]] = {each: [] for each in points}
    for seed in seeds:
        sweep = written(task, f"tune-{seed}", list(points.values()), seed, work.device)
        found = work_off(sweep, work, ".tuned", lambda run: tuning_loss(run, task, work.device))
        for each, cell in zip(points, sweep.cells, strict=True):
            losses[each].append(found[cell.name])
    return {
        kind: Tuning({rate: found for (of, rate), found in losses.items() if of == kind}) for kind in kinds_of(task)
    }


def run_all(task: Task, tuned: Mapping[str, Tuning], seeds: Sequence[int], work: Work) -> dict[str, list[list[float]]]:
    """Every kind with every seed at its rate: the scores of the test's questions, by kind and seed."""
    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds_of(task)}
    for seed in seeds:  # one seed of all kinds before the next, so that what there is can be compared
        points = [point(task, kind, tuned[kind].best) for kind in found]
        sweep = written(task, f"seed-{seed}", points, seed, work.device)
        scores = work_off(sweep, work, ".answers", lambda run: answers(run, task, work.device))
        for kind, cell in zip(found, sweep.cells, strict=True):
            found[kind].append(scores[cell.name])
            forget(sweep.out / cell.name)
    for run in sorted((task.directory / "runs").glob("*,seed=*")):  # with rates that were not the best
        forget(run)
    return found


def point(task: Task, kind: str, rate: float) -> dict[str, Any]:
    """A kind at a learning rate, as a cell of a sweep."""
    model = {"model": task.untrained} if kind == UNTRAINED else {}
    return {**model, **settings(kind), "optimizer.learning_rate": rate}


def written(task: Task, name: str, points: Sequence[Mapping[str, Any]], seed: int, device: str) -> Sweep:
    """The sweep of these points with one seed, through its file."""
    shared: dict[str, Any] = {
        "out": str(task.directory / "runs"),
        "seeds": [seed],
        "model": task.model,
        "device": device,
        "max_steps": task.steps,
        "batch_size": task.batch_size,
        **SHARED,
        "data.path": str(task.file("train")),
        "data.eval_size": 0,
        "data.seed": seed,
        **{f"data.{key}": value for key, value in task.data.items()},
    }
    lines = [f"{key} = {toml_value(value)}" for key, value in shared.items()]
    for each in points:
        lines += ["", "[[cells]]", *(f"{key} = {toml_value(value)}" for key, value in each.items())]
    path = task.directory / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(lines) + "\n")
    sweep = read_sweep(path)
    check_unchanged(sweep)
    return sweep


def work_off(sweep: Sweep, work: Work, ending: str, ask: Callable[[Path], Any]) -> dict[str, Any]:
    """Run every cell that is not done and ask it; what it answers is kept beside it and comes back by its name.

    Cells that another process has are waited for, and taken up if it ends without them.
    """
    while True:
        left = [cell for cell in sweep.cells if not beside(sweep, cell, ending).exists()]
        if not left:
            return {cell.name: json.loads(beside(sweep, cell, ending).read_text("utf-8")) for cell in sweep.cells}
        if not any(attend(sweep, cell, work, ending, ask) for cell in left):
            time.sleep(PATIENCE)


def attend(sweep: Sweep, cell: Cell, work: Work, ending: str, ask: Callable[[Path], Any]) -> bool:
    """Run a cell, as far as it is not done, and ask it; False where another process is at it."""
    started, run, kept = time.perf_counter(), sweep.out / cell.name, beside(sweep, cell, ending)
    with taken(beside(sweep, cell, ".asked")) as mine:
        if not mine:
            return False
        if not kept.exists():
            if state(sweep, cell) == "done" and not any((run / part).exists() for part in RESULTS):
                shutil.rmtree(run)  # its weights were removed, and now it is asked something else
            outcome = run_cell(sweep, cell, quiet=True, retry=True)
            if outcome.signal is not None:
                raise SystemExit(128 + outcome.signal)
            if outcome.status == "elsewhere":
                return False
            if state(sweep, cell) == "failed":
                error = FailedCells(f"{sweep.path}: {cell.name} failed: {failure(sweep, cell).reason}")
                error.exit_code = failure(sweep, cell).exit_code
                raise error
            write_whole(kept, json.dumps(ask(run)) + "\n")
    seconds = time.perf_counter() - started
    work.console.print(
        f"{sweep.path.stem}: {cell.name}: {seconds:.0f} s", markup=False, highlight=False, soft_wrap=True
    )
    return True


def forget(run: Path) -> None:
    """Remove the weights of a run that was asked, but for its adapter; its settings, losses and times stay."""
    for part in ("checkpoints", "model"):
        shutil.rmtree(run / part, ignore_errors=True)
