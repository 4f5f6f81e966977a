"""The task files of Super-NaturalInstructions: which of them are meant, and what is in them.

A path is one task file, a folder of them, or a clone of the official repository, which has `tasks/` and beside it
`splits/default/train_tasks.txt` and `test_tasks.txt` with the names of the tasks. A task's first hundred instances are
its test: the repository put them there, balanced over the labels, so that everybody takes the same.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.data.fields import text_of
from eval.data.json_records import ITEMS
from eval.data.records import Record, RecordFile, kind
from eval.superni.prompt import outputs
from models.errors import DataError

TRACK = "default"  # the English tasks; the other track, xlingual, is scored with another tokenizer
INSTANCES = 100

# The categories of the official test tasks, and what each is scored by.
CATEGORIES = {
    "textual_entailment": "exact_match",
    "cause_effect_classification": "exact_match",
    "coreference_resolution": "exact_match",
    "dialogue_act_recognition": "exact_match",
    "answerability_classification": "exact_match",
    "word_analogy": "exact_match",
    "overlap_extraction": "rougeL",
    "keyword_tagging": "rougeL",
    "question_rewriting": "rougeL",
    "title_generation": "rougeL",
    "data_to_text": "rougeL",
    "grammar_error_correction": "rougeL",
}


@dataclass(frozen=True)
class TaskFile:
    """A task with its first instances."""

    name: str
    """The file's, without its suffix: task1290_xsum_summarization."""
    head: Record
    """All that the file says of the task, and its name under "Task", as Tk-Instruct adds it."""
    instances: tuple[Record, ...]
    """Each with "id", "input" and its outputs as a list of texts."""

    @property
    def category(self) -> str | None:
        return category_name(self.head.get("Categories"))


def task_files(path: Path, split: str = "test") -> list[Path]:
    """The task files that a path stands for; the split counts in the official layout only."""
    if is_official(path):
        return split_files(path, split)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob("*.json") if not file.name.startswith("."))
    if not files:
        raise DataError(
            f"data: {path} has no task files (*.json), and no tasks/ and splits/{TRACK}/ as a clone of "
            "allenai/natural-instructions has them; name a task file, a folder of them, or such a clone"
        )
    return files


def is_official(path: Path) -> bool:
    return (path / "tasks").is_dir() and (path / "splits").is_dir()


def split_files(path: Path, split: str) -> list[Path]:
    """The files of an official split, in its order; one that lacks any is no longer that split, and refused."""
    listed = path / "splits" / TRACK / f"{split}_tasks.txt"
    try:
        names = [line.strip() for line in listed.read_text("utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"data: {listed} cannot be read: {error.strerror}; it names the tasks of the split") from error
    except UnicodeDecodeError as error:
        raise DataError(f"data: {listed}: byte {error.start} is not UTF-8") from error
    if not names:
        raise DataError(f"data: {listed} is empty; it names the tasks of the split, one a line")
    files = [path / "tasks" / f"{name}.json" for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"data: {path / 'tasks'} lacks {len(missing)} of the {len(files)} tasks that {listed} names (first: "
            f"{missing[0]}); add them, or name a folder with the files that there are"
        )
    return files


def read_task(path: Path, most: int = INSTANCES) -> TaskFile:
    """A task and its first instances; what cannot be used of them is refused with its line."""
    file = RecordFile(path)
    instances: list[Record] = []
    head: Record = {}
    for number, record in enumerate(file.scan()):
        try:
            if isinstance(record, ValueError):
                raise record
            if file.form != "object" and number:
                raise ValueError("is a second task; a task file has one")
            given = record.get(ITEMS)
            if not isinstance(given, list):
                raise ValueError(f"{ITEMS} is {kind(given)}; a task has a list of them")
            head = head or {"Task": path.stem, **{key: value for key, value in record.items() if key != ITEMS}}
            for item in given[:most]:
                instances.append(instance(item, f"{path.stem}-{len(instances)}"))
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"data: {file.where(number)}: {error}") from error
        if file.form == "object" and len(instances) >= most:
            break
    if not instances:
        raise DataError(f'data: {path} has no instances; a task has a list of them under "{ITEMS}"')
    return TaskFile(path.stem, head, tuple(instances))


def instance(item: Any, id: str) -> Record:
    """An instance whose outputs are a list of texts; one that has no id gets the one given."""
    if not isinstance(item, dict):
        raise ValueError(f"an instance is {kind(item)}; an object is needed")
    references = outputs(item)
    if not references:
        raise ValueError("output is an empty list; there is nothing to compare an answer with")
    return {"id": str(item.get("id") or id), "input": text_of(item, "input", blank=True), "output": references}


def category_name(given: Any) -> str | None:
    """A category as results have it, of the list of them the first; None where there is none.

    >>> category_name(["Data to Text"])
    'data_to_text'
    """
    if isinstance(given, list) and given:
        given = given[0]
    return "_".join(given.lower().split()) or None if isinstance(given, str) else None
