"""Examples as the ids that a model reads and learns, and several of them as tensors.

Padding is known by its place, never by its id: many tokenizers pad with the end-of-text id itself, and a model
that never learns that id never stops.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from models.tokenizer import Tokenizer

IGNORED = -100  # a label that the loss leaves out


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

    @property
    def target_length(self) -> int:
        """Tokens of a target of its own: a causal model's labels stand in the input, and its first is never learned."""
        return 0 if self.labels[:1] in ([], [IGNORED]) else len(self.labels)


def padding_id(tokenizer: Tokenizer) -> int:
    """The id to pad with. Where there is none any will do, since padding is masked and never learned."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)


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
