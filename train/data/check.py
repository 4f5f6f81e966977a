"""`qlora data check FILE` and `qlora data preview FILE`: what training would see of a data file.

A check reads every record and, with a tokenizer, makes the tokens of every example, one at a time. It tells the
layout and how it was found, lengths, what is dropped or cut, how much is learned, and whether the end of a text
is: a model that never learns it never stops. What would spoil a run is a problem, and ends with exit code 3.
"""

import difflib
import random
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from eval.data.records import printable
from models.checkpoint import describe
from models.errors import CheckpointError, ConfigError, DataError
from models.target import read_run
from models.tokenizer import Tokenizer, load_tokenizer
from train.data.config import DataConfig
from train.data.dataset import KINDS, Task, end_ids, limits, tokenize_as
from train.data.example import Example
from train.data.examples import Examples, open_examples
from train.data.formats import FORMATS
from train.data.preview import headline, marked
from train.data.tokenized import Tokenized
from train.task import TASKS

if TYPE_CHECKING:
    from rich.console import Console

ACTIONS = ("check", "preview")
SHOWN = 5  # examples that are named where something is amiss; the others are counted


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Look at a data file as training would see it."""

    action: Positional[str]
    """check (the whole file, in numbers) or preview (some examples, token by token)."""
    path: Positional[str]
    """File of records, or a directory of such files: JSON, JSONL, CSV or TSV."""
    tokenizer: str | None = None
    """A checkpoint, a run or a directory with a tokenizer; without one, characters are counted."""
    format: str | None = None
    """Layout of the records; found from their keys by default."""
    template: Literal["plain", "chat"] = "plain"
    """How a prompt and its response are joined: as they are, or as a chat."""
    chat_style: Literal["chatml", "guanaco"] | None = None
    """Form of a chat: the tokenizer's own by default, Guanaco's for Guanaco's records."""
    train_on_source: bool = False
    """Learn the prompt too."""
    max_len: int | None = None
    """Tokens of an example."""
    source_max_len: int | None = None
    """Tokens before the first response."""
    target_max_len: int | None = None
    """Tokens of a response."""
    task: Literal["auto", Task] = "auto"
    """What is to be learned of them: texts by a causal or a seq2seq model, or their labels; auto is what the checkpoint
    that the tokenizer is of would learn, and without one what the records have."""
    limit: int | None = None
    """check: look at so many examples only, from the front; every record is read all the same."""
    count: int = 3
    """preview: how many examples."""
    seed: int | None = None
    """preview: draw the examples by this seed, instead of the first ones."""
    ids: bool = False
    """preview: print the tokens' ids too."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            near = difflib.get_close_matches(self.action, ACTIONS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"action must be one of {', '.join(ACTIONS)}, not {self.action!r}{hint}")
        for name in ("limit", "count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; at least 1 example is needed")
        self.config()

    def config(self) -> DataConfig:
        """The same as a run's settings."""
        shared = {it.name for it in fields(DataConfig)} & {it.name for it in fields(self)} - {"seed"}
        return DataConfig(**{name: getattr(self, name) for name in shared})


def command(options: DataOptions, console: "Console") -> dict[str, Any]:
    from train.data.check_tables import show

    tokenizer = None if options.tokenizer is None else load_tokenizer(base_of(options.tokenizer))
    examples = open_examples(options.path, options.format)
    if options.action == "preview":
        return preview(options, examples, tokenizer, console)
    report = check(options, examples, tokenizer)
    show(report, console)
    if report["problems"]:
        listed = "".join(f"\n  {problem}" for problem in report["problems"])
        refusal = DataError(f"data: {options.path} is not fit to train on:{listed}")
        refusal.report = report
        raise refusal
    return report


def base_of(path: str) -> Path:
    """What a run was begun from; anything else is itself."""
    run = Path(path) / "config.toml"
    return Path(read_run(run)["model"]) if run.exists() else Path(path)


def decided(options: DataOptions, examples: Examples) -> DataOptions:
    """The options with a task that these examples can be learned for."""
    task = options.task if options.task != "auto" else task_of(options, examples)
    if examples.kind not in KINDS[task]:
        raise DataError(f"data: {options.path} ({examples.format}) holds {examples.kind}, which is not {task}")
    return replace(options, task=task)


def task_of(options: DataOptions, examples: Examples) -> Task:
    """What is to be learned, where that is not said."""
    able: tuple[Task, ...] = ()
    if options.tokenizer is not None:
        try:
            able = TASKS[describe(base_of(options.tokenizer)).architecture]
        except CheckpointError:  # a directory with no more than a tokenizer
            able = ()
    of_records: Task = "causal" if examples.kind == "text" else examples.kind
    return of_records if of_records in able or not able else able[0]


def check(options: DataOptions, examples: Examples, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What there is to tell of a file, as plain data."""
    options, found = decided(options, examples), Findings()
    for number in range(min(len(examples), options.limit or len(examples))):
        example = examples[number]
        found.take(example)
        if tokenizer is None:
            asked = example.opening if example.prompt is None else example.prompt
            found.lengths(len(asked), sum(len(m["content"]) for m in example.messages if m["role"] == "assistant"))
        else:
            found.tokens(tokenized(example, options, tokenizer, examples.format), end_ids(tokenizer))
    config = options.config()
    report: dict[str, Any] = {
        "path": options.path,
        "format": examples.format,
        "why": "named" if options.format else found_by(examples),
        "kind": examples.kind,
        "task": options.task,
        "files": [asdict(file) for file in examples.files],
        "records": examples.records,
        "examples": len(examples),
        "checked": found.count,
        "passed_over": [asdict(skipped) for skipped in examples.skipped],
        "unit": "characters" if tokenizer is None else "tokens",
        "prompt": spread(found.prompts),
        "response": spread(found.responses),
        "whole": spread(found.wholes),
        "duplicates": found.duplicates.report(),
        "empty_prompts": found.empty.report(),
        "problems": [],
    }
    if examples.kind == "classification":
        report["labels"] = {name: found.labels[number] for number, name in enumerate(examples.label_names)}
    elif examples.kind == "regression":
        scores = [label for label, count in found.labels.items() for _ in range(count)]
        report["scores"] = {"lowest": min(scores), "mean": sum(scores) / len(scores), "highest": max(scores)}
    if tokenizer is not None:
        kept = found.count - found.dropped.count
        learned = sum(found.responses)
        report |= {
            "dropped": found.dropped.report() | {"reason": f"no token to learn is left within {limits(config)}"},
            "cut_prompts": found.cut_prompts,
            "cut_responses": found.cut_responses,
            "label_tokens": learned,
            "label_share": round(learned / max(1, sum(found.wholes)), 4),
            "end_of_text": end_of_text(tokenizer, found.ended, kept),
        }
        report["problems"] = problems(report, kept, config)
    return report


def problems(report: dict[str, Any], kept: int, config: DataConfig) -> list[str]:
    """What would spoil a run."""
    if not kept:
        first = report["dropped"]["first"][0]
        return [
            f"none of {report['checked']} examples has a token to learn within {limits(config)} (first: {first}); "
            "raise max_len, or lower source_max_len"
        ]
    if "text" in KINDS[report["task"]] and not report["end_of_text"]["examples"]:
        return [
            f"the end of a text is learned in none of {kept} examples, so the model would never stop: "
            f"all responses are cut to {limits(config)}; raise target_max_len or max_len"
        ]
    return []


def end_of_text(tokenizer: Tokenizer, ended: int, kept: int) -> dict[str, Any]:
    """In how many examples an end is learned; and whether padding could be mistaken for it."""
    ends = sorted(end_ids(tokenizer))
    same = tokenizer.pad_token_id in ends
    return {
        "ids": {tokenizer.decode([i], skip_special=False): i for i in ends},
        "examples": ended,
        "share": round(ended / max(1, kept), 4),
        "pad_id": tokenizer.pad_token_id,
        "padding": "has an end's id, and is masked by its place" if same else "is masked by its place",
    }


def found_by(examples: Examples) -> str:
    """The keys by which the layout was found."""
    first = examples.sources.record(0)
    keys = next((keys for keys in FORMATS[examples.format].keys if set(keys) <= first.keys()), ())
    return f"keys {', '.join(keys)}"


@dataclass
class Cases:
    """Examples that share something: how many, and where the first few are."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(where)

    def report(self) -> dict[str, Any]:
        return {"count": self.count, "first": self.first}


class Findings:
    """What is counted over the examples, in little memory: three numbers and a hash of each."""

    def __init__(self) -> None:
        self.count = self.cut_prompts = self.cut_responses = self.ended = 0
        self.prompts, self.responses, self.wholes = array("I"), array("I"), array("I")
        self.dropped, self.duplicates, self.empty = Cases(), Cases(), Cases()
        self.labels: Counter[int | float] = Counter()
        self.seen: set[bytes] = set()

    def take(self, example: Example) -> None:
        """What can be told without tokens."""
        self.count += 1
        if example.label is not None:
            self.labels[example.label] += 1
        asked = example.opening if example.prompt is None else example.prompt
        if not asked.strip():
            self.empty.add(example.where)
        said = repr((example.prompt, example.response, example.messages, example.label)).encode()
        mark = blake2b(said, digest_size=12).digest()
        if mark in self.seen:
            self.duplicates.add(example.where)
        self.seen.add(mark)

    def tokens(self, example: Tokenized, ends: set[int]) -> None:
        self.cut_prompts += example.cut_prompt
        self.cut_responses += example.cut_response
        if not example.label_count:
            self.dropped.add(example.where)
            return
        learned = example.label_count if example.label is None else 0
        self.lengths(len(example.input_ids) + example.target_length - learned, learned)
        self.ended += any(label in ends for label in example.labels)

    def lengths(self, prompt: int, response: int) -> None:
        self.prompts.append(prompt)
        self.responses.append(response)
        self.wholes.append(prompt + response)


def spread(lengths: "array[int]") -> dict[str, Any]:
    """Median, high percentiles and the longest (each the length of an example), and a histogram by doubling."""
    ordered = sorted(lengths)
    if not ordered:
        return {"median": 0, "p90": 0, "p99": 0, "longest": 0, "histogram": []}
    ranks = {
        name: ordered[-(-share * len(ordered) // 100) - 1] for name, share in (("median", 50), ("p90", 90), ("p99", 99))
    }
    counts = Counter(length.bit_length() for length in ordered)
    bins = [(2**bits // 2, max(0, 2**bits - 1), counts[bits]) for bits in range(min(counts), max(counts) + 1)]
    return {**ranks, "longest": ordered[-1], "histogram": [list(it) for it in bins]}


def tokenized(example: Example, options: DataOptions, tokenizer: Tokenizer, layout: str) -> Tokenized:
    """An example's tokens; what refuses it is told with its line."""
    assert options.task != "auto"
    try:
        return tokenize_as(example, task=options.task, tokenizer=tokenizer, config=options.config(), layout=layout)
    except DataError as error:
        if str(error).startswith("data: "):
            raise
        raise DataError(f"data: {example.where}: {error}") from error


def preview(
    options: DataOptions, examples: Examples, tokenizer: Tokenizer | None, console: "Console"
) -> dict[str, Any]:
    """Some examples, token by token: in colour for a person, with [[what is learned]] in brackets elsewhere."""
    from train.data.token_view import legend, view

    if tokenizer is None:
        raise ConfigError("data preview shows tokens, so it needs --tokenizer: a checkpoint, a run or a directory")
    options = decided(options, examples)
    numbers = list(range(len(examples)))[: options.count]
    if options.seed is not None:
        count = min(options.count, len(examples))
        numbers = sorted(random.Random(options.seed).sample(range(len(examples)), count))
    coloured = console.is_terminal and not console.no_color
    console.print(f"{printable(options.path)}: {examples.format}, {len(examples)} examples", markup=False)
    if coloured:
        console.print(legend())
    shown: list[dict[str, Any]] = []
    for number in numbers:
        example = tokenized(examples[number], options, tokenizer, examples.format)
        if not example.label_count:
            reason = f"dropped, no token to learn is left within {limits(options.config())}"
            console.print(f"\n--- {printable(example.where)}: {reason}", markup=False, soft_wrap=True)
            shown.append({"where": example.where, "dropped": reason})
            continue
        text = printable(marked(example, tokenizer))
        shown.append({"where": example.where, "text": text, "input_ids": example.input_ids, "labels": example.labels})
        console.print(f"\n{printable(headline(example))}", markup=False, soft_wrap=True)
        console.print(view(example, tokenizer) if coloured else text, markup=False, soft_wrap=True)
        if options.ids:
            console.print(f"ids: {' '.join(map(str, example.input_ids))}", markup=False, soft_wrap=True)
            console.print(f"labels: {' '.join(map(str, example.labels))}", markup=False, soft_wrap=True)
    return {"path": options.path, "format": examples.format, "examples": shown}
