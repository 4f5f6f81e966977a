"""`qlora eval TARGET --task a,b`: one command for every measurement, on a checkpoint or a run.

Results, samples and the answers of the model are kept in a directory, a run's own or `evals/NAME`; so an evaluation
that was killed goes on, and one that is repeated asks the model nothing.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from eval.cache import Cache
from eval.evaluate import evaluate, limited
from eval.examinee import UNLIMITED, Examinee
from eval.registry import Settings, build
from eval.results import About, as_json, sanitized, table, write
from models import Llama
from models.checkpoint import describe
from models.commit import git_commit
from models.files import write_whole
from models.fingerprint import fingerprint
from models.roberta import Roberta
from models.target import LoadOptions, Target, load_target, resolve
from models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Measure a model or a run on tasks."""

    target: Positional[str]
    """A checkpoint or a run."""
    task: str = "perplexity"
    """What to measure: one name or several with commas between them (qlora list tasks)."""
    data: tuple[str, ...] = ()
    """Where the data lies: a path for all tasks, or NAME=PATH for each; a folder may hold one for each family."""
    protocol: tuple[str, ...] = ()
    """How it is measured, where there are several ways: a name, or NAME=PROTOCOL for each task."""
    split: tuple[str, ...] = ()
    """Part of the data, such as test, dev or val: a name, or NAME=SPLIT for each task."""
    num_fewshot: tuple[str, ...] = ()
    """Solved examples before each question: a number, or NAME=NUMBER for each task."""
    window: tuple[str, ...] = ()
    """Tokens in a window of a perplexity: a number, or NAME=NUMBER for each task."""
    limit: float | None = None
    """Take so many documents of each task from its start or, below 1, such a share; for trying things out only."""
    batch_size: int | Literal["auto"] = "auto"
    """Rows at a time; auto takes what suits the device, and halves it when memory runs out."""
    chat: bool = False
    """Put prompts into the model's chat form."""
    seed: int = 1234
    """Decides what is drawn, where a task draws anything."""
    out: str | None = None
    """Where to leave results, samples and answers; by default a run's eval folder, or evals/NAME for a checkpoint."""
    cache: bool = True
    """Keep the model's answers in that directory, and take those that are there."""
    prompts: str | None = None
    """Write the prompts to this file, a JSON object a line, and ask the model nothing."""
    load: LoadOptions = LoadOptions()
    """How the model is loaded."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1, or auto")
        if self.limit is not None and not (0 < self.limit < 1 or self.limit == int(self.limit) >= 1):
            raise ValueError(f"limit is {self.limit}; it must be a whole number, or a share between 0 and 1")

    @property
    def settings(self) -> Settings:
        return Settings(self.data, self.protocol, self.split, self.num_fewshot, self.window, self.seed)


def command(options: EvalOptions, console: "Console") -> dict[str, Any]:
    if options.prompts is not None:
        return write_prompts(options, Path(options.prompts), console)
    began = datetime.now()
    parts = resolve(options.target, options.load)
    examinee = load_examinee(options, parts)
    suites = build(options.task, options.settings, examinee)
    directory = out_directory(options, parts)
    cache = Cache(directory / "answers.sqlite" if options.cache else None)
    limit = options.limit if options.limit is None or options.limit < 1 else int(options.limit)
    try:
        with progress(console) as show:
            found = evaluate(suites, examinee, limit=limit, batch_size=options.batch_size, cache=cache, progress=show)
    finally:
        cache.close()
    about = About(
        model=options.target,
        model_args={**asdict(options.load), "dtype": str(examinee.model.dtype).removeprefix("torch.")},
        device=str(examinee.model.device),
        batch_size=options.batch_size,
        limit=limit,
        chat=options.chat,
        seed=options.seed,
        commit=git_commit(),
        began=began,
        ended=datetime.now(),
    )
    results = as_json(found, about)
    paths = write(found, results, directory, began)
    tell(results, table(found), cache.hits, paths[0], console)
    return {**results, "files": [str(path) for path in paths]}


def load_examinee(options: EvalOptions, parts: Target) -> Examinee:
    """The model that is examined."""
    model, tokenizer = load_target(options.target, options.load)
    architecture = "llama" if isinstance(model, Llama) else "roberta" if isinstance(model, Roberta) else "t5"
    return Examinee(
        tokenizer=tokenizer,
        architecture=architecture,
        max_tokens=model.max_tokens or UNLIMITED,
        loaded=model,
        identity=identity(parts, options.load, str(model.dtype), model.device.type),
        chat=options.chat,
    )


def identity(parts: Target, load: LoadOptions, dtype: str, device: str) -> str:
    """What tells a model's answers from another's: its files, how it is quantized, what it computes in."""
    files = [fingerprint(path) for path in (parts.base, parts.adapter) if path is not None]
    quant = None if parts.quant is None else asdict(parts.quant)
    what = [files, quant, dtype, device, parts.head, parts.labels, load.head, load.num_labels]
    return sha256(json.dumps(what).encode()).hexdigest()


def out_directory(options: EvalOptions, parts: Target) -> Path:
    if options.out is not None:
        return Path(options.out) / sanitized(Path(options.target).name or options.target)
    if parts.run is not None:
        return parts.run / "eval"
    return Path("evals") / sanitized(Path(options.target).absolute().name)


def write_prompts(options: EvalOptions, path: Path, console: "Console") -> dict[str, Any]:
    """The prompts of all tasks as they would be asked; of the target only the tokenizer is needed."""
    base = resolve(options.target, options.load).base
    tokenizer = load_tokenizer(base)
    architecture, window = "llama", UNLIMITED
    if not base.is_dir() or (base / "config.json").exists():
        described = describe(base)
        architecture, window = described.architecture, described.config.max_tokens or UNLIMITED
    examinee = Examinee(tokenizer=tokenizer, architecture=architecture, max_tokens=window, chat=options.chat)
    rows = [
        json.dumps(task.prompt(document, examinee))
        for suite in build(options.task, options.settings, examinee)
        for task in suite.tasks
        for document in limited(task, options.limit)
    ]
    write_whole(path, "".join(f"{row}\n" for row in rows))
    console.print(f"{len(rows)} prompts in {path}")
    return {"prompts": len(rows), "file": str(path)}


def tell(results: dict[str, Any], shown: str, hits: int, path: Path, console: "Console") -> None:
    """The table, and what a reader of its numbers has to know."""
    console.out(shown, highlight=False)
    if results["limited"]:
        console.print(f"[yellow]limited to {results['config']['limit']} documents a task: for trying out only[/yellow]")
    for name, count in results["cut_prompts"].items():
        console.print(f"{name}: {count} prompts were longer than the model takes and lost a part")
    for name, lines in results["warnings"].items():
        for line in lines:
            console.print(f"{name}: {line}", markup=False)
    if hits:
        console.print(f"{hits} answers were there from an earlier evaluation")
    console.print(f"results in {path}", markup=False)


@contextmanager
def progress(console: "Console") -> Iterator[Callable[[int, int], None] | None]:
    """A live line on a terminal; nothing elsewhere."""
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress("asking", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)
