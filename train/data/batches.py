"""Tokenized examples put together: padded batches, in an order that a seed and an epoch's number decide.

The order never asks the global random generator, so that a run resumed at any batch, or one that evaluates
more often, sees the same batches. Padding is known by its place, never by its id: many tokenizers pad with
the end-of-text id itself, and a model that never learns that id never stops.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

IGNORED = -100  # a label that the loss leaves out
POOL = 50  # batches that are sorted by length together


@dataclass(frozen=True)
class Batch:
    """Some examples put together."""

    inputs: dict[str, Tensor]
    """What model.loss takes: input_ids, attention_mask, labels."""
    where: tuple[str, ...] = ()
    """File and line of each example in it."""

    @property
    def tokens(self) -> int:
        """How many tokens the model reads, padding not counted."""
        mask = self.inputs.get("attention_mask")
        return self.inputs["input_ids"].numel() if mask is None else int((mask != 0).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same on another device."""
        return Batch({name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}, self.where)


@dataclass(frozen=True)
class Tokenized:
    """One example as the model sees it."""

    input_ids: list[int]
    labels: list[int]
    """For a causal model at each place its own id, to be learned, or IGNORED, and the model shifts them; for a
    seq2seq model the target; empty where a text has a `label`."""
    where: str
    """File and line that it came from."""
    opening: str = ""
    """What it begins with; examples that begin alike are held out together."""
    cut_prompt: bool = False
    cut_response: bool = False
    """Whether the response lost its end, and with it the end-of-text id."""
    label: int | float | None = None
    """The class of a text, or its number."""

    @property
    def label_count(self) -> int:
        """How much there is to learn: label tokens, or the one label of a text."""
        return sum(label != IGNORED for label in self.labels) if self.label is None else 1


class Batches:
    """Padded batches of a fixed number of examples; the last one of an epoch may be smaller."""

    def __init__(
        self,
        examples: Sequence[Tokenized],
        batch_size: int,
        pad_id: int,
        seed: int | None = None,
        group_by_length: bool = False,
    ) -> None:
        """Without a seed the order is the file's (or by length), every epoch."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.examples, self.batch_size, self.pad_id = examples, batch_size, pad_id
        self.seed, self.group_by_length = seed, group_by_length

    def count(self, number: int) -> int:
        """How many batches an epoch has."""
        return -(-len(self.examples) // self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, counted from 0; from the batch `start` on without making those before."""
        for rows in self.order(number)[start:]:
            examples = [self.examples[i] for i in rows]
            yield Batch(collate(examples, self.pad_id), tuple(example.where for example in examples))

    def order(self, number: int) -> list[list[int]]:
        """Which examples each batch of an epoch holds: every example once."""
        order = list(range(len(self.examples)))
        draw = None if self.seed is None else random.Random(f"{self.seed}/{number}")
        if draw is not None:
            draw.shuffle(order)
        if self.group_by_length:
            # Sorted in pools of some batches, so that an example's company still changes every epoch.
            pool = max(1, len(order)) if draw is None else POOL * self.batch_size
            pools = [order[i : i + pool] for i in range(0, len(order), pool)]
            order = [i for p in pools for i in sorted(p, key=lambda i: -len(self.examples[i].input_ids))]
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.group_by_length and draw is not None:
            draw.shuffle(batches)
        return batches


def collate(examples: Sequence[Tokenized], pad_id: int) -> dict[str, Shaped[Tensor, "..."]]:
    """Examples of different length as one batch, padded on the right; its keys are what model.loss takes."""
    return {
        "input_ids": padded([e.input_ids for e in examples], pad_id),
        "attention_mask": padded([[1] * len(e.input_ids) for e in examples], 0),
        "labels": (
            padded([e.labels for e in examples], IGNORED)
            if examples[0].label is None
            else torch.tensor([e.label for e in examples])
        ),
    }


def padded(rows: Sequence[Sequence[int]], fill: int) -> Int[Tensor, "B T"]:
    """Rows as one tensor, as wide as the longest."""
    tensor = torch.full((len(rows), max(map(len, rows))), fill)
    for place, row in enumerate(rows):
        tensor[place, : len(row)] = torch.tensor(row, dtype=torch.long)
    return tensor
