"""One cell at a time: whether it is done, and how it is run by exactly one of many workers.

A worker holds a lock on OUT/cells/NAME.lock while it has a cell. The system lets go of it when the worker ends,
however it ends, so a cell whose worker was killed can be taken up by another one at once. What became of a cell stands
in its run directory; only a failure is noted beside, since a run may fail before it has a directory.
"""

import gc
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from models.errors import Refusal
from models.files import write_whole
from models.lock import Held, lock, unlock
from train.config import read_config
from train.memory import reset_peak_memory
from train.preparation import prepare
from train.recipe import RunConfig
from train.resume import ResumeOptions
from train.resume import command as resume
from train.sweep.grid import Cell, Sweep
from train.toml import to_toml

State = Literal["new", "done", "interrupted", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What a worker made of a cell."""

    status: Literal["done", "interrupted", "failed", "elsewhere", "settled"]
    """elsewhere: another worker has it; settled: another one has ended it meanwhile."""
    signal: int | None = None


@dataclass(frozen=True)
class Failure:
    """Why a cell failed, and what the process would have ended with."""

    reason: str
    exit_code: int


def run_cell(sweep: Sweep, cell: Cell, *, quiet: bool = False, retry: bool = False) -> Outcome:
    """Run a cell from where it is, unless another worker has it or has ended it."""
    with taken(beside(sweep, cell, ".lock")) as mine:
        if not mine:
            return Outcome("elsewhere")
        if not is_left(sweep, cell, retry):
            return Outcome("settled")
        found = state(sweep, cell)
        note = beside(sweep, cell, ".failed")
        note.unlink(missing_ok=True)
        write_whole(beside(sweep, cell, ".toml"), to_toml(cell.config))
        reset_peak_memory()
        config = replace(cell.config, quiet=quiet)
        try:
            return continue_run(config) if found == "interrupted" else start_run(config)
        except Exception as error:  # the other cells go on; the list at the end has this one
            failure = Failure(first_line(error), exit_code(error))
            write_whole(note, json.dumps(asdict(failure) | {"traceback": traceback.format_exc()}) + "\n")
            return Outcome("failed")
        finally:
            gc.collect()  # a model is a cycle of modules and hooks; the next one needs its memory


def start_run(config: RunConfig) -> Outcome:
    """Run a cell from its first step, as `qlora train` does; one that failed is replaced."""
    result = prepare(replace(config, overwrite=(config.directory() / "config.toml").exists())).train()
    return Outcome(result.status, result.signal)


def continue_run(config: RunConfig) -> Outcome:
    """Go on with a run that was interrupted or killed, as `qlora resume` does."""
    from rich.console import Console

    options = ResumeOptions(run=str(config.directory()), quiet=config.quiet)
    try:
        resume(options, Console(stderr=True, quiet=config.quiet))
    except SystemExit as stop:  # how a command says that a signal came
        return Outcome("interrupted", int(stop.code or 0) - 128)
    return Outcome("done")


def state(sweep: Sweep, cell: Cell) -> State:
    """Say how far a cell is; to be relied on only while its lock is held."""
    directory = sweep.out / cell.name
    if beside(sweep, cell, ".failed").exists():
        return "failed"
    if not (directory / "config.toml").exists():
        return "new"
    status = directory / "STATUS"
    text = status.read_text("utf-8").strip() if status.exists() else "running"
    return "done" if text == "done" else "failed" if text.startswith("failed") else "interrupted"


def is_left(sweep: Sweep, cell: Cell, retry: bool = False) -> bool:
    """Is there something to do about a cell, by whomever?"""
    found = state(sweep, cell)
    return found in ("new", "interrupted") or (found == "failed" and retry)


def failure(sweep: Sweep, cell: Cell) -> Failure:
    """Say why a cell failed."""
    note, status = beside(sweep, cell, ".failed"), sweep.out / cell.name / "STATUS"
    if note.exists():
        said = json.loads(note.read_text("utf-8"))
        return Failure(said["reason"], said["exit_code"])
    return Failure(status.read_text("utf-8").strip().removeprefix("failed: "), 1)


def changed(sweep: Sweep, cell: Cell) -> str:
    """Say in what a cell's directory was begun with other settings than the file now gives; nothing if in none."""
    path = beside(sweep, cell, ".toml")  # what was asked for; the run's own file also says what followed from it
    if not (path.exists() and (sweep.out / cell.name / "config.toml").exists()):
        return ""
    then, now = settings(read_config(RunConfig, path)), settings(cell.config)
    other = [f"{key} was {then.get(key)} and is {value}" for key, value in now.items() if then.get(key) != value]
    return ", ".join(other)


def settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """Give what is saved of a config, by dotted key."""
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if hasattr(value, "__dataclass_fields__"):
            found |= settings(value, f"{prefix}{field.name}.")
        elif field.metadata.get("saved", True):
            found[prefix + field.name] = value
    return found


# Files beside a run


def beside(sweep: Sweep, cell: Cell, ending: str) -> Path:
    """Give the path of what a sweep keeps about a cell outside of its run."""
    return sweep.out / "cells" / f"{cell.name}{ending}"


@contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Hold the lock while the block lasts; False if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(path)
    except Held:
        yield False
        return
    try:
        yield True
    finally:
        unlock(held)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def exit_code(error: BaseException) -> int:
    """What the command line ends with after such an error."""
    if isinstance(error, Refusal):
        return error.exit_code
    return 5 if isinstance(error, torch.OutOfMemoryError) else 1
