"""What an evaluation leaves: one JSON of results, one JSONL of samples a task, and a table to look at.

Keys and file names are those of the lm-evaluation-harness, so that what compares its results reads ours: a metric is
"acc,none" (name and filter), its error "acc_stderr,none", a group's tasks are in "group_subtasks".
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from eval.evaluate import Evaluation, Outcome, Score
from eval.statistics import RESAMPLES
from models.files import write_whole

FILTER = "none"  # the harness's name for answers that are taken as they are


@dataclass(frozen=True)
class About:
    """What the results say of the evaluation itself."""

    model: str
    model_args: Mapping[str, Any]
    device: str
    batch_size: int | str
    limit: int | float | None
    max_chars: int | None
    chat: bool
    seed: int
    commit: str | None
    began: datetime
    ended: datetime


def as_json(found: Evaluation, about: About) -> dict[str, Any]:
    """The results in the harness's layout, with what it does not have: limited, warnings, prompts that were cut."""
    order = ordered(found)
    results = {
        name: {"alias": "  " * depth + (" - " if depth else "") + alias, **numbers(scores), **extra}
        for name, alias, depth, scores, extra in order
    }
    tasks = found.outcomes
    seconds = (about.ended - about.began).total_seconds()
    return {
        "results": results,
        **({"groups": {name: results[name] for name in found.groups}} if found.groups else {}),
        "group_subtasks": {name: list(it.group.members) for name, it in found.groups.items()},
        "configs": {name: config(outcome) for name, outcome in tasks.items()},
        "versions": {name: outcome.task.version for name, outcome in tasks.items()}
        | {name: it.group.version for name, it in found.groups.items() if it.group.version is not None},
        "n-shot": {name: outcome.task.num_fewshot for name, outcome in tasks.items()},
        "higher_is_better": {name: better(outcome.scores) for name, outcome in tasks.items()}
        | {name: better(it.scores) for name, it in found.groups.items()},
        "n-samples": {
            name: {"original": len(outcome.task.documents), "effective": len(outcome.documents)}
            for name, outcome in tasks.items()
        },
        "config": {
            "model": "qlora",
            "model_args": dict(about.model_args),
            "batch_size": about.batch_size,
            "device": about.device,
            "limit": about.limit,
            "max_chars": about.max_chars,
            "bootstrap_iters": RESAMPLES,
            "random_seed": about.seed,
            "numpy_seed": about.seed,
            "torch_seed": about.seed,
            "fewshot_seed": about.seed,
        },
        "limited": about.limit is not None or about.max_chars is not None,
        "cut_prompts": {name: outcome.cut for name, outcome in tasks.items() if outcome.cut},
        "warnings": {name: list(outcome.warnings) for name, outcome in tasks.items() if outcome.warnings},
        "git_hash": about.commit,
        "date": about.began.timestamp(),
        "task_hashes": {name: task_hash(outcome) for name, outcome in tasks.items()},
        "model_source": "qlora",
        "model_name": about.model,
        "model_name_sanitized": sanitized(about.model),
        "chat_template": about.chat,
        "total_evaluation_time_seconds": seconds,
    }


def ordered(found: Evaluation) -> list[tuple[str, str, int, Mapping[str, Score], dict[str, Any]]]:
    """Groups with their tasks below them, then the tasks of no group: name, alias, depth, scores, counts."""
    rows: list[tuple[str, str, int, Mapping[str, Score], dict[str, Any]]] = []
    placed: set[str] = set()

    def place(name: str, depth: int) -> None:
        if name in placed:
            return
        placed.add(name)
        if name in found.groups:
            it = found.groups[name]
            rows.append((name, it.group.alias or name, depth, it.scores, {}))
            for member in it.group.members:
                place(member, depth + 1)
        elif name in found.outcomes:
            outcome = found.outcomes[name]
            rows.append((name, outcome.task.alias, depth, outcome.scores, {"sample_len": len(outcome.documents)}))

    inner = {member for it in found.groups.values() for member in it.group.members}
    for name in [*(name for name in found.groups if name not in inner), *found.outcomes]:
        place(name, 0)
    return rows


def numbers(scores: Mapping[str, Score]) -> dict[str, Any]:
    """Values and errors under the harness's keys; an error that does not exist is "N/A", as there."""
    row: dict[str, Any] = {}
    for name, score in scores.items():
        row[f"{name},{FILTER}"] = finite(score.value)
        row[f"{name}_stderr,{FILTER}"] = "N/A" if score.stderr is None else finite(score.stderr)
    return row


def finite(value: float) -> float | str:
    """A number that JSON can hold, or its name."""
    return value if math.isfinite(value) else str(value)


def better(scores: Mapping[str, Score]) -> dict[str, bool]:
    return {name: score.higher_is_better for name, score in scores.items()}


def config(outcome: Outcome) -> dict[str, Any]:
    task = outcome.task
    return {
        "task": task.name,
        "output_type": task.output_type,
        "num_fewshot": task.num_fewshot,
        "metric_list": [
            {"metric": name, "higher_is_better": metric.higher_is_better} for name, metric in task.metrics.items()
        ],
        "metadata": {"version": task.version},
        **task.settings,
    }


def samples(outcome: Outcome) -> Iterable[dict[str, Any]]:
    """A row for each document: what was asked, what was answered, what that was worth."""
    rows = zip(outcome.documents, outcome.requests, outcome.answers, outcome.values, strict=True)
    for number, (document, requests, answers, values) in enumerate(rows):
        target = outcome.task.target(document)
        arguments = {
            f"gen_args_{i}": {f"arg_{j}": argument for j, argument in enumerate(request.arguments)}
            for i, request in enumerate(requests)
        }
        yield {
            "doc_id": number,
            "doc": document,
            "target": target,
            "arguments": arguments,
            "resps": [[answer] for answer in answers],
            "filtered_resps": list(answers),
            "filter": FILTER,
            "metrics": list(values),
            "doc_hash": hashed(document),
            "prompt_hash": hashed(requests[0].arguments[0] if requests else ""),
            "target_hash": hashed(target),
            **values,
        }


def task_hash(outcome: Outcome) -> str:
    """What tells whether two results were had from the same documents, prompts and targets."""
    found = sha256()
    for document, requests in zip(outcome.documents, outcome.requests, strict=True):
        found.update(hashed([document, [it.arguments for it in requests], outcome.task.target(document)]).encode())
    return found.hexdigest()


def hashed(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write(found: Evaluation, results: Mapping[str, Any], directory: Path, date: datetime) -> list[Path]:
    """Leave results and samples in a directory; each file is there whole or not at all. Their paths come back."""
    stamp = date.isoformat().replace(":", "-")
    paths = []
    for name, outcome in found.outcomes.items():
        path = directory / f"samples_{name}_{stamp}.jsonl"
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples(outcome)))
        paths.append(path)
        paths += outcome.task.write(directory, outcome.documents, outcome.answers)
    path = directory / f"results_{stamp}.json"
    write_whole(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")  # last: it says that all are there
    return [path, *paths]


def sanitized(name: str) -> str:
    """A name that can be a folder's.

    >>> sanitized("runs/my model")
    'runs__my_model'
    """
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in name.strip("/").replace("/", "__"))


def table(found: Evaluation) -> str:
    """A Markdown table of all values, the tasks of a group below it."""
    head = ("Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr")
    rows: list[tuple[str, ...]] = [head]
    for name, alias, depth, scores, _ in ordered(found):
        outcome = found.outcomes.get(name)
        version = outcome.task.version if outcome else found.groups[name].group.version
        first: tuple[str, ...] = (
            "  " * max(depth - 1, 0) + ("- " if depth else "") + alias,
            "" if version is None else f"{version:g}",
            FILTER if scores else "",
            str(outcome.task.num_fewshot) if outcome else "",
        )
        for metric, score in scores.items():
            error = "N/A" if score.stderr is None else f"{score.stderr:.4f}"
            arrow = "↑" if score.higher_is_better else "↓"
            rows.append((*first, metric, arrow, f"{score.value:.4f}", "±", error))
            first = ("", "", FILTER, "")
        if not scores:
            rows.append((*first, "", "", "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    sides = ["<>"[column in (1, 3, 6, 8)] for column in range(len(head))]

    def line(cells: Sequence[str], fill: str = " ") -> str:
        padded = (f"{cell:{fill}{side}{w}}" for cell, side, w in zip(cells, sides, widths, strict=True))
        return f"|{'|'.join(padded)}|"

    rule = line([":" if side == ">" else "" for side in sides], "-")
    return "\n".join([line(head), rule, *map(line, rows[1:])])
