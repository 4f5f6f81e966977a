"""`qlora bench parity`: does a base in few bits cost anything, once it is fine-tuned?

    qlora bench parity --work runs/parity                                    what ships: OASST1 and the toys
    qlora bench parity --work runs/parity --data sst2=GLUE rte=GLUE --limit 300 --seeds 3 --out parity.json
    qlora bench parity --work runs/7b --model llama-7b --device cuda --steps 1000 --data mnli=GLUE

A name of GLUE takes a folder with its files; any other name a file of conversations or pairs of texts; `toy-roberta`
and `toy-t5` need none (`benchmarks/parity/toys.py`).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.parity.answers import answers_before
from benchmarks.parity.report import compare, draw, show
from benchmarks.parity.runs import SHARED, Work, run_all, tune
from benchmarks.parity.tasks import Task, glue_task, text_task
from benchmarks.parity.toys import TOYS, toy_task
from eval.glue.prompted import PROMPTS
from models.device import pick_device
from models.errors import ConfigError
from models.files import write_whole
from models.fingerprint import fingerprint
from train.demo import DATA
from train.demo_model import demo_model

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.command import BenchOptions

TUNING_SEEDS = 2  # with which every learning rate is tried; a rate that is chosen by one can be a lucky one
SHIPPED = (f"oasst1={DATA}", *TOYS)


def bench(options: "BenchOptions", console: "Console") -> dict[str, Any]:
    """Compare every kind of fine-tuning on every task, and draw what came of it."""
    if options.work is None:
        raise ConfigError("parity makes many runs; say where to keep them: --work DIRECTORY")
    place, work = Path(options.work), Work(str(pick_device(options.device)), console)
    results = {}
    for name, path in asked_for(options.data or SHIPPED).items():
        results[name] = compared(made(name, path, place, options), options.seeds, work)
    show(console, results)
    if options.plot:
        draw(results, options.plot)
    return {"seeds": list(range(1, options.seeds + 1)), "setting": SHARED, "tasks": results}


def asked_for(data: Sequence[str]) -> dict[str, Path | None]:
    """The tasks by name, each with its data; a name that is given twice and a path that is missing are refused."""
    given: dict[str, Path | None] = {}
    for text in data:
        name, _, path = text.partition("=")
        if not name or bool(path) == (name in TOYS) or name in given:
            why = "comes twice" if name in given else "takes no path" if name in TOYS else "is no NAME=PATH"
            raise ConfigError(f"data: {text!r} {why}; give NAME=PATH once for each task, or {' or '.join(TOYS)}")
        given[name] = Path(path) if path else None
    return given


def made(name: str, path: Path | None, work: Path, options: "BenchOptions") -> Task:
    """A task with its files written."""
    if path is None:
        return toy_task(name, work, limit=options.limit, steps=options.steps)
    model = options.model or str(demo_model())
    if name in PROMPTS:
        return glue_task(name, path, work, model, options.limit, options.steps)
    return text_task(name, path, work, model, options.limit, options.steps)


def compared(task: Task, seeds: int, work: Work) -> dict[str, Any]:
    """Tune, run and compare one task."""
    every = tuple(range(1, seeds + 1))
    before = kept(task.directory / "before.json", lambda: answers_before(task, work.device))
    tuned = tune(task, every[:TUNING_SEEDS], work)
    scores = run_all(task, tuned, every, work)
    rates = {
        kind: {
            "tried": {str(rate): losses for rate, losses in it.losses.items()},
            "best": it.best,
            "at_edge": it.at_edge,
        }
        for kind, it in tuned.items()
    }
    told = {"measure": task.measure, "model": fingerprint(task.model), "source": task.source, "steps": task.steps}
    return {**told, "batch_size": task.batch_size, "data": task.data, "rates": rates, **compare(task, scores, before)}


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds, or what is made and then written to it."""
    if not path.exists():
        write_whole(path, json.dumps(make()) + "\n")
    return json.loads(path.read_text("utf-8"))
