"""Batches of tokenized examples, in an order that a seed and an epoch's number decide.

A run that is resumed at any batch, or evaluates more often, sees the same batches: those before are not made,
and no random generator is asked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, device

from models.errors import ConfigError
from train.data.order import Order, Rules, batch_sizes, order
from train.data.packing import pack
from train.data.tokenized import IGNORED, Tokenized, collate, padding_id

__all__ = ["IGNORED", "Batch", "Batches", "Tokenized", "collate", "padding_id"]


@dataclass(frozen=True)
class Batch:
    """Some examples put together."""

    inputs: dict[str, Tensor]
    """What model.loss takes: input_ids, attention_mask, labels."""
    where: tuple[str, ...] = ()
    """File and line of each example in it."""
    number: int = 0
    """Its place among the micro-batches of its step."""

    @property
    def tokens(self) -> int:
        """How many tokens the model reads, padding not counted."""
        mask = self.inputs.get("attention_mask")
        return self.inputs["input_ids"].numel() if mask is None else int((mask != 0).sum())

    def to(self, device: device | str) -> "Batch":
        """The same on another device."""
        return replace(self, inputs={name: x.to(device, non_blocking=True) for name, x in self.inputs.items()})

    def without_rows(self) -> "Batch":
        """None of its rows: what a process has that gets no part of a micro-batch."""
        return replace(self, inputs={name: x[:0] for name, x in self.inputs.items()}, where=())

    def stand_in(self) -> "Batch":
        """A row with something to learn of the same kind, for a pass that others make and that here counts nothing."""
        ids, labels = self.inputs["input_ids"].new_zeros(1, 2), self.inputs["labels"]
        labels = labels.new_zeros(1, 2) if labels.ndim == 2 else labels.new_zeros(1)
        return replace(self, inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})


@runtime_checkable
class Measured(Protocol):
    """Examples whose sizes are known before they are tokenized."""

    @property
    def sizes(self) -> Int[np.ndarray, "examples 2"]:
        """Tokens of each example's input, and of a target of its own, else 0."""
        ...


class Batches:
    """Padded batches of a fixed number of rows, or of a number of tokens; the last one may be smaller."""

    def __init__(
        self,
        examples: Sequence[Tokenized],
        batch_size: int,
        pad_id: int,
        seed: int | None = None,
        group_by_length: bool = False,
        *,
        batch_tokens: int | None = None,
        row_tokens: int | None = None,
    ) -> None:
        """Without a seed the order is the file's (or by length), every epoch.

        With `batch_tokens` a batch has as many rows as fit into so many tokens, padding included, and
        `batch_size` says nothing. With `row_tokens` a row holds as many examples as fit into so many tokens.
        """
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens), ("row_tokens", row_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.examples, self.pad_id = examples, pad_id
        self.sizes = examples.sizes if isinstance(examples, Measured) else measured(examples)
        self.rules = Rules(
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            row_tokens=row_tokens,
            group_by_length=group_by_length,
            seed=seed,
        )
        self.known: tuple[int, Order] | None = None
        self.check()

    def check(self) -> None:
        """Refuse what no batch or no row could hold."""
        limits = {"row_tokens": self.rules.row_tokens, "batch_tokens": self.rules.batch_tokens}
        for name, limit in limits.items():
            if limit is not None and len(self.sizes) and (longest := self.sizes.sum(axis=1).max()) > limit:
                where = self.examples[int(self.sizes.sum(axis=1).argmax())].where
                raise ConfigError(
                    f"data: {where} has {longest} tokens, more than {name}={limit}; raise {name} or lower data.max_len"
                )
        if self.rules.row_tokens is not None and self.sizes[:, 1].any():
            raise ConfigError("data: examples with a target of their own cannot be packed; set data.pack=false")

    def count(self, number: int) -> int:
        """How many batches an epoch has."""
        if self.rules.batch_tokens is None and self.rules.row_tokens is None:
            return -(-len(self.examples) // self.rules.batch_size)
        return len(self.order(number))

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, counted from 0; from the batch `start` on without making those before."""
        for place in range(start, len(self.order(number))):
            yield self.micro_batch(number, place)

    def micro_batch(self, number: int, place: int, part: int = 0, parts: int = 1) -> Batch:
        """The batch at a place in an epoch, or a part of its rows; no others are tokenized."""
        rows = self.order(number)[place]
        own = rows[part * len(rows) // parts : (part + 1) * len(rows) // parts]
        return self.batch(own) if own else self.batch(rows[:1]).without_rows()

    def longest(self, number: int = 0, parts: int = 1) -> Batch:
        """That batch of an epoch which needs most memory: it has most tokens, padding included.

        It is one of the epoch's own. Another epoch's can be larger, by little, where the longest example here is
        in the last and smaller batch, or where the number of rows varies. Where batches are cut into parts it is as
        many of its rows as a part has, the longest ones.
        """
        order = self.order(number)
        widths, tokens = batch_sizes(self.sizes, order).T
        rows = order[int(np.lexsort((widths, tokens))[-1])]
        if parts > 1:
            rows = sorted(rows, key=lambda row: -self.sizes[row].sum())[: -(-len(rows) // parts)]
        return self.batch(rows)

    def batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Some rows of examples, by number."""
        examples = [[self.examples[i] for i in row] for row in rows]
        where = tuple(e.where for row in examples for e in row)
        if self.rules.row_tokens is not None:
            return Batch(pack(examples, self.pad_id), where)
        return Batch(collate([e for row in examples for e in row], self.pad_id), where)

    def order(self, number: int) -> Order:
        """Which examples each batch of an epoch holds: every example once."""
        if self.known is None or self.known[0] != number:
            self.known = number, order(self.sizes, self.rules, number)
        return self.known[1]


def measured(examples: Sequence[Tokenized]) -> Int[np.ndarray, "examples 2"]:
    """Sizes of examples that are at hand."""
    return np.array([(len(e.input_ids), e.target_length) for e in examples], dtype=np.int64).reshape(-1, 2)
