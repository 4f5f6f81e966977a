"""What is learned in a comparison, and what of it is measured: three files of examples that have nothing in common.

Every kind of fine-tuning learns from the same `train`, chooses its learning rate by its loss on `tune`, and is compared
on `test`, which neither has seen. Of a task of GLUE the test is the published dev set, and the label is learned as text
behind the harness's prompt; of any other file of conversations or pairs of texts a share is kept apart, examples that
open alike together.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Literal

from eval.glue.documents import PARTS, needed
from eval.glue.prompted import PROMPTS
from models.checkpoint import describe
from models.errors import ConfigError, DataError
from models.files import write_whole
from models.tokenizer import load_tokenizer
from train.data import DataConfig, load_data
from train.data.dataset import Part
from train.data.example import Example

Record = dict[str, Any]
Rates = Mapping[Literal["full", "adapters"], tuple[float, ...]]

SPLIT_SEED = 0
SHARE = 0.2  # of a file without a dev set that is the test; half as much chooses the rate
TUNE = 128  # examples of GLUE's train set, likewise
RATES: Rates = {"full": (5e-5, 1e-4, 2e-4), "adapters": (5e-4, 1e-3, 2e-3)}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something to learn, the settings it is learned with, and how its answers are scored."""

    name: str
    model: str
    """The checkpoint to begin with."""
    directory: Path
    """Where its three files are, and what is made of them."""
    measure: Literal["accuracy", "loss"]
    """Of the answers' words or classes; or nats per label token, of which less is better."""
    words: tuple[str, ...] = ()
    """Of an accuracy: what may be written; none where the model has a head of classes."""
    steps: int
    batch_size: int
    data: Mapping[str, Any] = field(default_factory=dict)
    """How its examples are read, as settings of a run's data."""
    rates: Rates = field(default_factory=lambda: RATES)
    """Learning rates that are tried."""
    untrained: str | None = None
    """The same model before it was pretrained, to be trained as the full one is; for a model made here."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where its examples come from, for the record."""

    def file(self, part: str) -> Path:
        return self.directory / "data" / f"{part}.jsonl"

    @property
    def less_is_better(self) -> bool:
        return self.measure == "loss"


def write_parts(directory: Path, parts: Mapping[str, Iterable[Record]]) -> dict[str, int]:
    """Write each part as a file and give how many records it has; files of other data are never replaced."""
    sizes = {}
    for name, records in parts.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path, text = directory / "data" / f"{name}.jsonl", "".join(lines)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # runs of other processes may be reading it
            write_whole(path, text)
        elif path.read_text("utf-8") != text:
            raise ConfigError(f"work: {path} holds other examples than are asked for now; give another --work")
        sizes[name] = len(lines)
    return sizes


def glue_task(name: str, data: Path, work: Path, model: str, limit: int | None, steps: int | None) -> Task:
    """A task of GLUE, as prompts or for a RoBERTa as classes; `limit` is how many questions of the dev set it takes."""
    asked, part = PROMPTS[name], PARTS[name]
    labels = describe(model).architecture == "roberta"

    def written(rows: Iterable[Mapping[str, Any]]) -> list[Record]:
        if labels:
            keys = ("sentence1", "sentence2") if len(part.task.texts) == 2 else ("sentence",)
            return [dict(zip(keys, it["texts"], strict=True)) | {"label": part.task.names[it["label"]]} for it in rows]
        return [{"prompt": asked.render(it["texts"]), "completion": f" {asked.words[it['label']]}"} for it in rows]

    train, dev = (needed(part, data, split) for split in ("train", "dev"))
    rows = list(train.rows)
    if len(rows) < 4:
        raise DataError(f"data: {train.path} has {len(rows)} examples; at least 4 are needed, to learn and to tune")
    Random(SPLIT_SEED).shuffle(rows)
    tune = min(TUNE, len(rows) // 4)
    parts = {"train": written(rows[tune:]), "tune": written(rows[:tune]), "test": written(dev.rows[:limit])}
    sizes = write_parts(work / name, parts)
    return Task(
        name=name,
        model=model,
        directory=work / name,
        measure="accuracy",
        words=() if labels else asked.words,
        steps=steps or 24,
        batch_size=16 if len(part.task.texts) == 1 else 8,
        data={"format": "classification" if labels else "prompt-completion", "max_len": 256},
        source={"train": train.path.name, "test": dev.path.name, "examples": sizes},
    )


def text_task(name: str, path: Path, work: Path, model: str, limit: int | None, steps: int | None) -> Task:
    """Conversations or pairs of texts of a file, scored by the loss on answers; `limit` is the most test examples."""
    settings: dict[str, Any] = {"template": "chat", "max_len": 160}
    whole = load_data(DataConfig(path=str(path), eval_size=SHARE, seed=SPLIT_SEED, **settings), load_tokenizer(model))
    rest, test = records(whole.train), records(whole.held_out)[:limit]
    order = list(range(len(rest)))
    Random(SPLIT_SEED).shuffle(order)
    openings = [example.opening for example in chosen(whole.train)]
    held: set[str] = set()
    for place in order:  # whole groups that open alike
        if sum(opening in held for opening in openings) >= SHARE / 2 * len(rest):
            break
        held.add(openings[place])
    parts = {
        "train": [record for record, opening in zip(rest, openings, strict=True) if opening not in held],
        "tune": [record for record, opening in zip(rest, openings, strict=True) if opening in held],
        "test": test,
    }
    if not parts["train"]:
        raise DataError(f"data: {path}: all {len(rest)} examples that are left open alike; nothing is left to learn")
    sizes = write_parts(work / name, parts)
    return Task(
        name=name,
        model=model,
        directory=work / name,
        measure="loss",
        steps=steps or 8,
        batch_size=8,
        data={"format": "chat" if "messages" in test[0] else "prompt-completion", **settings},
        source={"file": path.name, "sha256": whole.manifest["sha256"], "examples": sizes},
    )


def chosen(part: Sequence[Any]) -> list[Example]:
    """The examples behind a part of a data set."""
    assert isinstance(part, Part)
    return [part.examples[int(place)] for place in part.places]


def records(part: Sequence[Any]) -> list[Record]:
    """A part's examples as they can be written to a file."""
    return [
        {"messages": list(example.messages)}
        if example.prompt is None
        else {"prompt": example.prompt, "completion": example.response}
        for example in chosen(part)
    ]
