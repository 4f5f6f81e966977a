"""From a data file to what a model learns: which examples are trained on, which are held out, which dropped.

An example without a token to learn is dropped, and listed. Before a run starts its commonest mistakes are looked
for: a file of which nothing can be learned, or little, and responses that never end, so that the model would
never learn to stop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any, Literal, overload

import numpy as np
from jaxtyping import Int

from models.chat import CHATML_END
from models.errors import ConfigError, DataError
from models.tokenizer import Tokenizer
from train.data import causal, labelled, seq2seq
from train.data.config import DataConfig
from train.data.examples import Examples, Kind, open_examples
from train.data.formats import Example
from train.data.settled import lost_end, settled
from train.data.split import split
from train.data.survey import CUT_PROMPT, CUT_RESPONSE, ENDS, Survey, survey
from train.data.tokenized import Tokenized

Task = Literal["causal", "seq2seq", "classification", "regression"]
Tokenize = Callable[[Example, Tokenizer, DataConfig, str], Tokenized]

# How an example becomes ids.
TOKENIZE: dict[str, Tokenize] = {
    "causal": causal.tokenize,
    "seq2seq": seq2seq.tokenize,
    "classification": labelled.tokenize,
    "regression": labelled.tokenize,
}
# Which kinds of data a task can learn from; a label is a text too, where the data says which.
KINDS: dict[str, tuple[Kind, ...]] = {
    "causal": ("text", "classification", "regression"),
    "seq2seq": ("text", "classification", "regression"),
    "classification": ("classification",),
    "regression": ("regression",),
}


@dataclass(frozen=True)
class Dataset:
    """What a data file came to: examples to train on, examples held out, and a record of both."""

    train: Sequence[Tokenized]
    held_out: Sequence[Tokenized]
    manifest: dict[str, Any]
    drops: Sequence[str] = ()
    """File, line and reason of each example that is dropped."""
    warnings: tuple[str, ...] = ()
    """What a person should know before the run starts."""


@dataclass(frozen=True, eq=False)
class Part(Sequence[Tokenized]):
    """Some of the examples, each tokenized whenever it is asked for."""

    examples: Sequence[Example]
    places: Int[np.ndarray, " part"]
    """Which of them."""
    sizes: Int[np.ndarray, "part 2"]
    """Tokens of each one's input, and of a target of its own, else 0."""
    make: Callable[[Example], Tokenized]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Tokenized: ...
    @overload
    def __getitem__(self, index: slice) -> "Part": ...
    def __getitem__(self, index: int | slice) -> "Tokenized | Part":
        if isinstance(index, slice):
            return Part(self.examples, self.places[index], self.sizes[index], self.make)
        return self.make(self.examples[int(self.places[index])])


@dataclass(frozen=True, eq=False)
class Drops(Sequence[str]):
    """The examples that are dropped: file, line and reason of each."""

    examples: Sequence[Example]
    places: Int[np.ndarray, " dropped"]
    reason: str

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Drops": ...
    def __getitem__(self, index: int | slice) -> "str | Drops":
        if isinstance(index, slice):
            return Drops(self.examples, self.places[index], self.reason)
        return f"{self.examples[int(self.places[index])].where}: {self.reason}"


def load_data(config: DataConfig, tokenizer: Tokenizer, task: Task = "causal") -> Dataset:
    """Read a file, tokenize it once to measure it, and split it."""
    if config.pack and task != "causal":
        raise ConfigError(f"data: only a causal language model can learn packed rows, not {task}; set data.pack=false")
    examples = open_examples(config.path, config.format)
    if config.per_task is not None:
        examples.keep(config.per_task, config.seed)
    if examples.kind not in KINDS[task]:
        raise DataError(
            f"data: {config.path} ({examples.format}) holds examples of {examples.kind}, but {task} needs "
            f"{' or '.join(KINDS[task])}"
        )
    make = partial(tokenize_as, task=task, tokenizer=tokenizer, config=config, layout=examples.format)
    ends = end_ids(tokenizer) if "text" in KINDS[task] else ()
    found = survey((make(example) for example in examples), ends)
    kept, dropped = np.flatnonzero(found.labels).astype(np.int32), np.flatnonzero(found.labels == 0).astype(np.int32)
    drops = Drops(examples, dropped, f"no token to learn is left within {limits(config)}")
    warnings = check_drops(drops, len(examples))
    used = found[kept]
    if ends and not used.having(ENDS).any():
        raise DataError(
            f"data: no example of {config.path} has an end-of-text id to learn, so the model would never stop: "
            f"all {len(kept)} responses are cut to {limits(config)}. Raise data.target_max_len or data.max_len"
        )

    def part(chosen: Int[np.ndarray, " part"]) -> Part:
        return Part(examples, kept[chosen], used.sizes[chosen], make)

    train, held_out = split(
        used.openings, config.eval_size, config.seed, lambda place: examples[int(kept[place])].where
    )
    record = manifest(config, task, examples, used, len(train), drops)
    if ends:
        record["ends"] = int(used.having(ENDS).sum())
    return Dataset(part(train), part(held_out), record, drops, warnings)


def tokenize_as(example: Example, *, task: Task, tokenizer: Tokenizer, config: DataConfig, layout: str) -> Tokenized:
    """An example's ids, with what it leaves open decided."""
    decided = settled(example, task, tokenizer, config)
    made = TOKENIZE[task](decided, tokenizer, config, layout)
    return replace(made, cut_prompt=True) if lost_end(example, decided) else made


def end_ids(tokenizer: Tokenizer) -> set[int]:
    """The ids that end a response: the end of the text or, in ChatML, of a turn."""
    ids = (tokenizer.eos_token_id, tokenizer.special_tokens.get(CHATML_END))
    return {i for i in ids if i is not None}


def check_drops(drops: Sequence[str], total: int) -> tuple[str, ...]:
    """Refuse a file of which nothing is left, and warn of one that loses more than half."""
    if 2 * len(drops) <= total:
        return ()
    said = (
        f"data: {len(drops)} of {total} examples are dropped (first: {drops[0]}). "
        "Raise data.max_len, or lower data.source_max_len"
    )
    if len(drops) == total:
        raise DataError(said)
    return (said,)


def limits(config: DataConfig) -> str:
    names = ("source_max_len", "target_max_len", "max_len")
    return ", ".join(f"{n}={getattr(config, n)}" for n in names if getattr(config, n) is not None) or "no limit"


def manifest(
    config: DataConfig, task: Task, examples: Examples, used: Survey, train: int, drops: Sequence[str]
) -> dict[str, Any]:
    """What became of a data file, for data/manifest.json."""
    tokens, labels = int(used.inputs.sum() + used.targets.sum()), int(used.labels.sum())
    return {
        **provenance(examples),
        "format": examples.format,
        "task": task,
        "template": config.template,
        "records": examples.records,
        "passed_over": {skipped.reason: skipped.count for skipped in examples.skipped},
        "examples": len(examples),
        "dropped": len(drops),
        "first_dropped": list(drops[:5]),
        "cut_prompts": int(used.having(CUT_PROMPT).sum()),
        "cut_responses": int(used.having(CUT_RESPONSE).sum()),
        "train": train,
        "held_out": len(used.inputs) - train,
        "tokens": tokens,
        "label_tokens": labels,
        "label_share": round(labels / tokens, 4),
        "longest": int(used.inputs.max()),
        "longest_target": int(used.targets.max()),
    }


def provenance(examples: Examples) -> dict[str, Any]:
    """Name, hash and size of what was read; several files have the hash of a list of theirs, as sha256sum writes it."""
    files = examples.files
    digest = files[0].sha256
    if len(files) > 1:
        digest = sha256("".join(f"{file.sha256}  {file.name}\n" for file in files).encode()).hexdigest()
    return {"file": examples.path.name, "sha256": digest, "bytes": sum(file.bytes for file in files)}
