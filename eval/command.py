"""`qlora eval TARGET --task a,b`: one command for every measurement, on a checkpoint or a run.

Results, samples and the answers of the model are kept in a directory, a run's own or `evals/NAME`; so an evaluation
that was killed goes on, and one that is repeated asks the model nothing. Of several processes each asks a part, and the
main one keeps and writes.
"""

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from eval.cache import Cache
from eval.evaluate import evaluate, limited
from eval.examinee import UNLIMITED, Examinee
from eval.loading import load_examinee
from eval.progress import progress
from eval.registry import Settings, build, wanted
from eval.results import About, as_json, sanitized, table, write
from models.checkpoint import describe
from models.commit import git_commit
from models.files import make_directory, write_whole
from models.parallel import world
from models.parallel.launch import Processes
from models.parallel.watch import TIMEOUT
from models.target import LoadOptions, resolve
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
    """Tokens in a window of a perplexity, or at most in a prompt of MMLU: a number, or NAME=NUMBER for each task."""
    max_chars: int | None = None
    """Take so many characters of a perplexity's text only, from its start; for trying things out only."""
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
    nproc: int = 1
    """Work on so many processes of this machine, a GPU each."""
    timeout: float = TIMEOUT
    """Seconds that a process waits for the others before it gives up."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1, or auto")
        if self.max_chars is not None and self.max_chars < 1:
            raise ValueError(f"max_chars is {self.max_chars}; it must be at least 1")
        if self.limit is not None and not (0 < self.limit < 1 or self.limit == int(self.limit) >= 1):
            raise ValueError(f"limit is {self.limit}; it must be a whole number, or a share between 0 and 1")

    @property
    def processes(self) -> Processes:
        return Processes(self.nproc, self.load.device, self.timeout)

    @property
    def settings(self) -> Settings:
        return Settings(self.data, self.protocol, self.split, self.num_fewshot, self.window, self.max_chars, self.seed)


def command(options: EvalOptions, console: "Console") -> dict[str, Any]:
    if options.prompts is not None:
        return write_prompts(options, Path(options.prompts), console)
    began = datetime.now()
    asked = wanted(options.task, options.settings)  # before the model is loaded: what is wrong is said at once
    directory = out_directory(options)
    examinee = load_examinee(options.target, options.load, options.chat)
    suites = build(asked, examinee)
    if world.is_main():
        make_directory(directory)
    cache = Cache(directory / "answers.sqlite" if options.cache and world.is_main() else None)
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
        max_chars=options.max_chars,
        chat=options.chat,
        seed=options.seed,
        commit=git_commit(),
        began=began,
        ended=datetime.now(),
    )
    results = as_json(found, about)
    if not world.is_main():
        return results
    paths = write(found, results, directory, began)
    tell(results, table(found), cache.hits, paths[0], console)
    return {**results, "files": [str(path) for path in paths]}


def out_directory(options: EvalOptions) -> Path:
    """Where results go."""
    parts = resolve(options.target, options.load)
    if options.out is not None:
        return Path(options.out) / sanitized(Path(options.target).name or options.target)
    if parts.run is not None:
        return parts.run / "eval"
    return Path("evals") / sanitized(Path(options.target).absolute().name)


def write_prompts(options: EvalOptions, path: Path, console: "Console") -> dict[str, Any]:
    """The prompts of all tasks as they would be asked; of the target only the tokenizer is needed."""
    asked = wanted(options.task, options.settings)
    parts = resolve(options.target, options.load)
    base = parts.base
    tokenizer = load_tokenizer(base)
    architecture, window = "llama", UNLIMITED
    if not base.is_dir() or (base / "config.json").exists():
        described = describe(base)
        architecture, window = described.architecture, described.config.max_tokens or UNLIMITED
    examinee = Examinee(
        tokenizer=tokenizer, architecture=architecture, max_tokens=window, chat=options.chat, run=parts.run
    )
    rows = [
        json.dumps(task.prompt(document, examinee))
        for suite in build(asked, examinee)
        for task in suite.tasks
        for document in limited(task, options.limit)
    ]
    if world.is_main():
        write_whole(path, "".join(f"{row}\n" for row in rows))
    console.print(f"{len(rows)} prompts in {path}")
    return {"prompts": len(rows), "file": str(path)}


def tell(results: dict[str, Any], shown: str, hits: int, path: Path, console: "Console") -> None:
    """The table, and what a reader of its numbers has to know."""
    console.out(shown, highlight=False)
    if results["limited"]:
        console.print("[yellow]limited to a part of the data: for trying out only[/yellow]")
    for name, count in results["cut_prompts"].items():
        console.print(f"{name}: {count} prompts were longer than the model takes and lost a part")
    for name, lines in results["warnings"].items():
        for line in lines:
            console.print(f"{name}: {line}", markup=False)
    if hits:
        console.print(f"{hits} answers were there from an earlier evaluation")
    console.print(f"results in {path}", markup=False)
