"""What label a model gives a text or a pair of texts: its logits, read between the marks it was pre-trained with.

    <s> a </s>        <s> a </s></s> b </s>

What is too long is cut at the end of the longer text of the two, token by token until both fit, which keeps as much
as can be of the shorter one; the marks stay. Training reads texts by the same function.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eval.examinee import Examinee
from eval.likelihood import padded
from models.errors import ConfigError, NonFiniteError
from models.labelled import labelling
from models.roberta import Roberta
from models.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Label:
    """The answer is the list of logits, one for each class, or the one number of a regression."""

    ids: tuple[int, ...]
    texts: tuple[str, ...] = field(compare=False)
    cut: int = field(default=0, compare=False)
    """Tokens of the texts that there was no room for."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.texts

    @property
    def key(self) -> tuple[Any, ...]:
        return "label", self.ids

    @property
    def row(self) -> Hashable:
        return self.ids

    @property
    def length(self) -> int:
        return len(self.ids)

    @classmethod
    @torch.inference_mode()
    def answer(cls, examinee: Examinee, rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
        model = labelling(examinee.model)
        logits = logits_of(model, *padded([group[0].ids for group in rows], model.device))
        for group, row in zip(rows, logits, strict=True):
            if not bool(row.isfinite().all()):
                begins = " / ".join(group[0].texts)[:60]
                raise NonFiniteError(
                    f"the model gives {row.tolist()} for the text {begins!r}; load it in float32 "
                    "(--load.dtype float32), and if that changes nothing, its weights are broken"
                )
        return [[row.tolist()] * len(group) for group, row in zip(rows, logits, strict=True)]


def logits_of(
    model: Roberta, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None = None
) -> Float[Tensor, "B labels"]:
    """What the model gives each text, in float32 on the CPU; of a shared model the blocks alone are run by all."""
    assert model.classifier is not None
    return model.classifier(model.first(input_ids, attention_mask)).float().cpu()


def label(examinee: Examinee, texts: Sequence[str], most: int | None = None) -> Label:
    """The question which label a text or a pair has; `most` is a limit below that of the model."""
    room = examinee.max_tokens if most is None else min(most, examinee.max_tokens)
    ids, cut = marked(texts, examinee.tokenizer, room)
    return Label(ids=tuple(ids), texts=tuple(texts), cut=cut)


def marked(texts: Sequence[str], tokenizer: Tokenizer, most: int | None) -> tuple[list[int], int]:
    """Ids of one text or two between their marks, `most` of them, and how many tokens there was no room for."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None or eos is None:
        raise ConfigError("this tokenizer has no ids for <s> and </s>, between which RoBERTa reads a text")
    parts = [tokenizer.encode(text) for text in texts]
    room = None if most is None else most - 2 * len(parts)
    if room is not None and room < len(parts):
        raise ConfigError(f"max_len={most} leaves no room for the texts between their marks")
    kept = shortened(parts, room)
    ids = [bos, *kept[0], eos] + [i for part in kept[1:] for i in (eos, *part, eos)]
    return ids, sum(map(len, parts)) - sum(map(len, kept))


def shortened(parts: Sequence[list[int]], room: int | None) -> list[list[int]]:
    """The texts without the ends that do not fit, taken off the longest first; of two as long, off the last."""
    lengths = [len(part) for part in parts]
    while room is not None and sum(lengths) > room:
        longest = max(range(len(lengths)), key=lambda place: (lengths[place], place))
        others = [length for place, length in enumerate(lengths) if place != longest]
        # Down to the next one's length at once, and from there one at a time.
        lengths[longest] -= max(1, min(sum(lengths) - room, lengths[longest] - max(others, default=0)))
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]
