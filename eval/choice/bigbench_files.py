"""BIG-bench's task files: where they are, what they say, and what holds where they say nothing."""

import json
import re
from pathlib import Path
from typing import Any

from eval.choice.reading import text
from eval.data.records import kind
from eval.task import Document
from models import DataError

LINE = r"[^\.\?\!\;\n]+"  # BIG-bench's regular expression for a task without one
DEFAULTS = {
    "task_prefix": "",
    "example_input_prefix": "\nQ: ",
    "example_output_prefix": "\nA: ",
    "choice_prefix": "\n  choice: ",
    "few_shot_example_separator": "\n",
}


def task_files(data: Path) -> list[Path]:
    """The task files below a folder; those that only introduce sub-tasks are left out."""
    if data.is_file():
        return [data]
    found = sorted(data.rglob("task.json")) or sorted(data.glob("*.json"))
    folders = {folder for path in found for folder in path.parent.parents}  # that have tasks below them
    found = [path for path in found if path.name != "task.json" or path.parent not in folders]
    if not found:
        raise DataError(f"data: {data} holds no task.json, nor do its folders")
    return found


def checked(whole: Document) -> Document:
    """What a task file says, with defaults for what it does not say, and its different examples."""
    given = whole.get("examples")
    if not isinstance(given, list) or not given:
        raise ValueError("is no BIG-bench task: it has no list of 'examples'")
    wording = {key: text({**DEFAULTS, **whole}, key) for key in DEFAULTS}
    found = {}
    for number, it in enumerate(given, 1):
        try:
            document = example(it)
        except ValueError as error:
            raise ValueError(f"example {number}: {error}") from error
        found[json.dumps(document)] = document
    stop_rule(whole)
    return {"append_choices_to_input": True, **whole, **wording, "examples": list(found.values())}


def example(given: Any) -> Document:
    """An example of a task file, without its comments."""
    if not isinstance(given, dict):
        raise ValueError(f"is {kind(given)}, not an object")
    found: Document = {"input": text(given, "input")}
    scores, target = given.get("target_scores"), given.get("target")
    if scores is not None:
        if not isinstance(scores, dict) or len(scores) < 2 or not all(map(str.strip, scores)):
            raise ValueError("its 'target_scores' are not two choices or more, none of them empty, with their scores")
        if not all(isinstance(score, int | float) for score in scores.values()):
            raise ValueError("a score among its 'target_scores' is no number")
        found["target_scores"] = scores
    if target is not None:
        found["target"] = target if isinstance(target, list) else [target]
        if not found["target"] or not all(isinstance(one, str) for one in found["target"]):
            raise ValueError("its 'target' is no text and no list of texts")
    elif scores is None:
        raise ValueError("has neither 'target_scores' nor 'target'")
    return found


def stop_rule(whole: Document) -> tuple[str, re.Pattern[str] | None]:
    """The text that ends an answer, if any, and what is taken of it."""
    stop, regex = whole.get("stop_string") or "", whole.get("output_regex") or ""
    if not isinstance(stop, str) or not isinstance(regex, str):
        raise ValueError("its 'stop_string' and 'output_regex' have to be texts")
    if not stop and not regex:
        regex = LINE
    try:
        pattern = re.compile(regex) if regex else None
    except re.error as error:
        raise ValueError(f"its 'output_regex' {regex!r} is no regular expression ({error})") from error
    if pattern is not None and pattern.groups > 1:
        raise ValueError(f"its 'output_regex' {regex!r} has {pattern.groups} groups; at most one can be taken")
    return stop, pattern
