"""Subsets of several data sets that are alike in all but what they say: as many examples, with answers as long.

Data sets differ in the length of their answers before they differ in anything else, and who learns from longer ones
learns from more tokens. So lengths are matched: answers are sorted into bins by their label tokens, and from every set
as many are drawn from a bin as the set that has fewest there allows. What the model is shown is one question, or the
last of a dialogue, in its own chat form, whatever the layout of the file.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.chatbot.questions import marked
from models.errors import DataError
from models.files import write_whole
from models.tokenizer import Tokenizer
from train.data import DataConfig
from train.data.dataset import provenance, tokenize_as
from train.data.example import Example
from train.data.examples import open_examples
from train.data.instruction_formats import read_pair

BIN = 32  # label tokens


@dataclass(frozen=True)
class Pool:
    """A data set's questions, each once, with their answers and how many label tokens those have."""

    name: str
    records: list[dict[str, str]]
    """Of the layout prompt-completion: "input", a text or a dialogue with marks, and "output"."""
    label_tokens: np.ndarray
    facts: dict[str, Any]
    """Name, hash and size of what was read."""


def layout(path: Path, max_len: int, seed: int = 0) -> DataConfig:
    """How the subsets are read, in training and in evaluation."""
    return DataConfig(
        path=str(path), format="prompt-completion", template="chat", max_len=max_len, eval_size=0, seed=seed
    )


def read_pool(name: str, path: Path, tokenizer: Tokenizer, max_len: int) -> Pool:
    """What of a file fits the length whole; of questions that are alike one, since the other may be held out."""
    examples = open_examples(path)
    if examples.kind != "text":
        raise DataError(
            f"data: {name}: {path} ({examples.format}) has labels where questions with answers are compared"
        )
    found: dict[str, tuple[dict[str, str], int]] = {}
    for example in examples:
        record = exchange_of(example)
        made = tokenize_as(
            read_pair(record),
            task="causal",
            tokenizer=tokenizer,
            config=layout(path, max_len),
            layout="prompt-completion",
        )
        if made.label_count and not made.cut_response:
            found.setdefault(record["input"], (record, made.label_count))
    records, counts = [record for record, _ in found.values()], [count for _, count in found.values()]
    return Pool(name, records, np.array(counts, dtype=int), provenance(examples))


def exchange_of(example: Example) -> dict[str, str]:
    """A question with all that stands before it and its answer: the first, or the last where that alone is learned."""
    messages = list(example.messages)
    last = len(messages) - 1 if example.last_only else example.first_answer
    asked = [message for message in messages[:last] if message["role"] != "system"]
    return {"input": marked(asked, example.where), "output": messages[last]["content"]}


def matched(
    pools: Sequence[Pool], count: int, seed: int, among: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The places of `count` records of every pool, as many of every length in each; drawn among all or among these."""
    among = among or {pool.name: np.arange(len(pool.records)) for pool in pools}
    bins = {pool.name: pool.label_tokens[among[pool.name]] // BIN for pool in pools}
    width = 1 + max((int(each.max()) for each in bins.values() if len(each)), default=0)
    common = np.min([np.bincount(each, minlength=width) for each in bins.values()], axis=0)
    if common.sum() < count:
        raise DataError(
            f"data: {count} examples of like length are wanted of each set, but only {common.sum()} answers of "
            f"{' and '.join(bins)} have a counterpart in all of them"
        )
    wanted = apportioned(common, count)
    found = {}
    for number, pool in enumerate(pools):
        order = np.random.default_rng((seed, number)).permutation(len(bins[pool.name]))
        places = [order[bins[pool.name][order] == length][:most] for length, most in enumerate(wanted)]
        found[pool.name] = np.sort(among[pool.name][np.concatenate(places)])
    return found


def apportioned(common: np.ndarray, count: int) -> np.ndarray:
    """`count` shared among bins in proportion to what they hold, by largest remainders; never more than they hold.

    >>> apportioned(np.array([5, 1, 4]), 5).tolist()
    [3, 0, 2]
    """
    exact = common * count / max(common.sum(), 1)
    whole = np.floor(exact).astype(int)
    largest = np.argsort(-(exact - whole), kind="stable")[: count - whole.sum()]
    whole[largest] += 1
    return whole


def without(pools: Sequence[Pool], taken: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The places of all other records."""
    return {pool.name: np.setdiff1d(np.arange(len(pool.records)), taken[pool.name]) for pool in pools}


def write(pool: Pool, places: np.ndarray, path: Path) -> Path:
    """These records as JSON lines."""
    write_whole(path, "".join(json.dumps(pool.records[place]) + "\n" for place in places))
    return path
