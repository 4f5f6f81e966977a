"""How probable a masked model finds a sentence: each token is hidden in turn and guessed from all the others.

Of two sentences that differ in some words only the tokens that both have are scored, so that what is compared is how
likely the rest of the sentence is given those words, and not how frequent the words themselves are. This is the
measure of CrowS-Pairs.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import torch

from eval.examinee import Examinee
from eval.likelihood import padded
from eval.scoring import POSITIONS, refuse_nan
from models import ConfigError, DataError
from models.roberta import Roberta
from models.roberta_heads import MaskedHead

MASK = "<mask>"


@dataclass(frozen=True, kw_only=True)
class PseudoLikelihood:
    """The answer is the sum, over some places, of the log-probability in nats of the token that was hidden there."""

    ids: tuple[int, ...]
    places: tuple[int, ...]
    mask: int
    text: str = field(compare=False)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.text, list(self.places)

    @property
    def key(self) -> tuple[Any, ...]:
        return "pseudo", self.ids, self.places, self.mask

    @property
    def row(self) -> Hashable:
        return "pseudo", self

    @property
    def length(self) -> int:
        return len(self.ids)

    @classmethod
    def answer(cls, examinee: Examinee, rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
        return [
            [total] * len(group)
            for total, group in zip(totals(examinee, [group[0] for group in rows]), rows, strict=True)
        ]


def pseudo_likelihoods(examinee: Examinee, first: str, second: str) -> tuple[PseudoLikelihood, PseudoLikelihood]:
    """The questions how probable the common tokens of two sentences are, in the one and in the other."""
    mask = examinee.tokenizer.special_tokens.get(MASK)
    if mask is None:
        raise ConfigError(f"masked scores need a vocabulary with {MASK}, and this one has none")
    ids = [examinee.tokenizer.encode(text, bos=True, eos=True) for text in (first, second)]
    for text, found in zip((first, second), ids, strict=True):
        if len(found) > examinee.max_tokens:
            raise DataError(
                f"a sentence has {len(found)} tokens, but the model takes {examinee.max_tokens}: {text[:60]!r}"
            )
    places = common(*ids)
    return (
        PseudoLikelihood(ids=tuple(ids[0]), places=places[0], mask=mask, text=first),
        PseudoLikelihood(ids=tuple(ids[1]), places=places[1], mask=mask, text=second),
    )


def common(first: Sequence[int], second: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where two lists of ids agree, by difflib as in the official metric, without the ids around the sentences.

    >>> common([0, 5, 6, 7, 2], [0, 9, 9, 6, 7, 2])
    ((2, 3), (3, 4))
    """
    blocks = SequenceMatcher(None, first, second).get_matching_blocks()
    pairs = [(block.a + step, block.b + step) for block in blocks for step in range(block.size)][1:-1]
    return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)


@torch.inference_mode()
def totals(examinee: Examinee, requests: Sequence[PseudoLikelihood]) -> list[float]:
    """The sum for each request. Masked copies go through the model as many at a time as there are requests."""
    model, head = masked_model(examinee)
    copies = [(number, place) for number, request in enumerate(requests) for place in request.places]
    found: list[list[float]] = [[] for _ in requests]
    size = min(len(requests), POSITIONS)
    for begin in range(0, len(copies), size):
        some = copies[begin : begin + size]
        ids, there = padded([hidden_at(requests[number], place) for number, place in some], model.device)
        places = torch.tensor([place for _, place in some], device=model.device)
        targets = torch.tensor([requests[number].ids[place] for number, place in some], device=model.device)
        each = torch.arange(len(some), device=model.device)
        logits = head(model.hidden(ids, there)[each, places], model.embedding.weight).float()  # (copies, V)
        values = logits.log_softmax(dim=-1)[each, targets]
        refuse_nan(values)
        for (number, _), value in zip(some, values.tolist(), strict=True):
            found[number].append(value)
    return [math.fsum(values) for values in found]


def hidden_at(request: PseudoLikelihood, place: int) -> list[int]:
    """A sentence's ids with the mask at one place."""
    return [*request.ids[:place], request.mask, *request.ids[place + 1 :]]


def masked_model(examinee: Examinee) -> tuple[Roberta, MaskedHead]:
    """The model and its head that fills masks; a head for labels cannot stand in, and a new one would be random."""
    model = examinee.model
    if not isinstance(model, Roberta):
        raise ConfigError(f"masked scores need a masked language model (RoBERTa), not {type(model).__name__}")
    if model.lm_head is None:
        raise ConfigError(
            "masked scores need RoBERTa's head that fills masks, but this model has one that labels texts; "
            "take the checkpoint as it was pre-trained, with head mlm"
        )
    return model, model.lm_head
