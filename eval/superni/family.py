"""Super-NaturalInstructions as Tk-Instruct is evaluated: a task file is a task, and its category a group.

A model reads at most 1,024 tokens and writes at most 128, greedily. Scores are means over all instances, in percent.

A causal model gets the same prompt as a T5, but for the space at its end, which belongs to the answer's first token;
and it stops at a blank line. Every part of the prompt ends with one, so what a model writes behind it is no longer the
answer but a next example. Of the few references with blank lines of their own, long messages all, the rest is missed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from eval.examinee import Examinee
from eval.generation import generation, prompt_room
from eval.request import Request
from eval.room import Room
from eval.statistics import MEAN
from eval.superni.metrics import METRICS, scores
from eval.superni.prompt import Encoding, task_prompt
from eval.superni.tasks import CATEGORIES, TaskFile, read_task, task_files
from eval.task import Document, Family, Group, Spec, Suite, Task
from models.errors import ConfigError, DataError
from models.files import append_line, write_whole

MAX_SOURCE, MAX_TARGET = 1024, 128  # tokens, as Tk-Instruct is trained and evaluated
STOP = "\n\n"
PREDICTIONS = "predicted_examples.jsonl"  # the reference's name

# What a prompt shows: by default the definition and two positive examples.
PROTOCOLS = {
    "default": Encoding(),
    "def": Encoding(num_pos_examples=0),
    "pos": Encoding(add_task_definition=False),
    "def-pos-neg": Encoding(num_neg_examples=2),
    "def-pos-expl": Encoding(add_explanation=True),
}


@dataclass
class Predictions:
    """The file that all tasks of an evaluation write their answers to, one after the other."""

    begun: set[Path] = field(default_factory=set)

    def write(self, path: Path, rows: Sequence[dict[str, Any]]) -> list[Path]:
        """Add a task's rows; the first ones replace what an earlier evaluation left. The file is named once."""
        lines = [json.dumps(row) for row in rows]
        if path not in self.begun:
            write_whole(path, "".join(f"{line}\n" for line in lines))
            self.begun.add(path)
            return [path]
        for line in lines:
            append_line(path, line)
        return []


class SuperNITask(Task):
    """One task: an instance is a document."""

    output_type = "generate_until"
    metrics = dict.fromkeys(METRICS, MEAN)

    def __init__(self, task: TaskFile, protocol: str, encoding: Encoding, split: str, predictions: Predictions) -> None:
        self.task, self.encoding, self.predictions = task, encoding, predictions
        self.name, self.alias = f"superni_{task.name}", task.name
        self.num_fewshot = encoding.num_pos_examples
        self.documents = [{"id": it["id"], "Task": task.name, "Instance": it} for it in task.instances]
        self.settings = {
            "protocol": protocol,
            "split": split,
            "category": task.category,
            **asdict(encoding),
            "max_source_length": MAX_SOURCE,
            "max_target_length": MAX_TARGET,
        }

    def requests(self, document: Document, examinee: Examinee) -> list[Request]:
        t5 = examinee.architecture == "t5"
        chat = examinee.chat and not t5
        most = prompt_room(examinee, MAX_TARGET) - (len(examinee.opened("")) if chat else 0)
        room = Room(examinee.tokenizer, min(MAX_SOURCE, most), eos=t5)
        given = document["Instance"]["input"]
        prompt = task_prompt(self.task.head, given, self.encoding, room)
        bare = task_prompt(self.task.head, given, replace(self.encoding, num_pos_examples=0, num_neg_examples=0))
        asked = generation(
            examinee,
            prompt.strip(),
            MAX_TARGET,
            stop=() if t5 else (STOP,),
            keep="end" if chat else "start",
            room=None if chat else room.max_tokens,
        )
        lost = len(room.encode(bare)) - room.max_tokens  # examples that are left out are no loss
        return [replace(asked, prompt=prompt, cut=max(0, lost))]

    def score(self, document: Document, answers: Sequence[Any]) -> dict[str, Any]:
        return scores(answers[0].strip(), document["Instance"]["output"])

    def target(self, document: Document) -> Any:
        return document["Instance"]["output"]

    def write(self, directory: Path, documents: Sequence[Document], answers: Sequence[Sequence[Any]]) -> list[Path]:
        """Each instance with all that is known of its task and the answer, as the reference leaves them."""
        rows = [
            {**self.task.head, **document, "prediction": given[0].strip()}
            for document, given in zip(documents, answers, strict=True)
        ]
        return self.predictions.write(directory / PREDICTIONS, rows)


def build(spec: Spec) -> Suite:
    """The tasks of the data, or those of one category, and a group for each category and for all."""
    if spec.examinee.architecture == "roberta":
        raise ConfigError(f"{spec.name} needs a model that writes, a LLaMA or a T5; this one is a RoBERTa")
    if spec.data is None:
        raise ConfigError(f"{spec.name} needs data: {FAMILY.data}")
    protocol, split = spec.protocol or next(iter(PROTOCOLS)), spec.split or FAMILY.splits[0]
    encoding = PROTOCOLS[protocol]
    if spec.num_fewshot is not None:
        encoding = replace(encoding, num_pos_examples=spec.num_fewshot)

    files, predictions = task_files(spec.data, split), Predictions()
    found = [(file, read_task(file)) for file in files]
    wanted = [(file, it) for file, it in found if spec.name in (FAMILY.name, f"superni_{it.category}")]
    if not wanted:
        raise DataError(f"data: none of the {len(files)} tasks of {spec.data} is of the category of {spec.name}")
    for file, task in wanted:
        try:
            task_prompt(task.head, "", encoding)
        except ValueError as error:
            raise DataError(f"data: {file}: {error}") from error
    tasks = [SuperNITask(task, protocol, encoding, split, predictions) for _, task in wanted]
    return Suite(tasks, grouped(tasks) if spec.name == FAMILY.name else grouped(tasks)[1:])


def grouped(tasks: Sequence[SuperNITask]) -> list[Group]:
    """All tasks, by category where they have one; and each category."""
    categories: dict[str, list[str]] = {}
    alone = []
    for it in tasks:
        if it.task.category is None:
            alone.append(it.name)
        else:
            categories.setdefault(it.task.category, []).append(it.name)
    within = [Group(f"superni_{name}", tuple(members), name) for name, members in sorted(categories.items())]
    return [Group(FAMILY.name, (*(group.name for group in within), *alone)), *within]


FAMILY = Family(
    name="superni",
    summary="Super-NaturalInstructions as Tk-Instruct is evaluated: ROUGE-L and exact match of what is written",
    build=build,
    names=tuple(f"superni_{category}" for category in CATEGORIES),
    protocols=tuple(PROTOCOLS),
    splits=("test", "train"),
    data="a task file, a folder of them, or a clone of allenai/natural-instructions (tasks/ and splits/)",
)
