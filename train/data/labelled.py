"""One example as a RoBERTa learns it: a text or a pair of them between the marks it was pre-trained with, and a label.

    <s> a </s>        <s> a </s></s> b </s>

What is too long for `max_len` is cut at the end of the longer text of the two, token by token until both fit, which
keeps as much as can be of the shorter one; the marks stay.
"""

from collections.abc import Sequence

from models.errors import ConfigError, DataError
from models.tokenizer import Tokenizer
from train.data.config import DataConfig
from train.data.formats import Example
from train.data.tokenized import IGNORED, Tokenized


def tokenize(example: Example, tokenizer: Tokenizer, config: DataConfig, layout: str = "") -> Tokenized:
    """Ids of the texts with their marks, cut to `max_len`, and the label: the number of a class, or a number."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None or eos is None:
        raise ConfigError("data: this tokenizer has no ids for <s> and </s>, between which RoBERTa reads a text")
    if not 1 <= len(example.texts) <= 2 or example.label is None:
        raise DataError(f"data: {example.where} has {len(example.texts)} texts and the label {example.label}")
    if example.label == IGNORED:
        raise DataError(f"data: {example.where} has the label {IGNORED}, which stands for none; shift all numbers")
    parts = [tokenizer.encode(text) for text in example.texts]
    room = None if config.max_len is None else config.max_len - 2 * len(parts)
    if room is not None and room < len(parts):
        raise ConfigError(f"data: max_len={config.max_len} leaves no room for the texts between their marks")
    kept = cut(parts, room)
    ids = [bos, *kept[0], eos] + [i for part in kept[1:] for i in (eos, *part, eos)]
    shorter = sum(map(len, kept)) < sum(map(len, parts))
    return Tokenized(ids, [], example.where, example.opening, cut_prompt=shorter, label=example.label)


def cut(parts: Sequence[list[int]], room: int | None) -> list[list[int]]:
    """The texts without the ends that do not fit, taken off the longest first; of two as long, off the last."""
    lengths = [len(part) for part in parts]
    while room is not None and sum(lengths) > room:
        longest = max(range(len(lengths)), key=lambda place: (lengths[place], place))
        others = [length for place, length in enumerate(lengths) if place != longest]
        # Down to the next one's length at once, and from there one at a time.
        lengths[longest] -= max(1, min(sum(lengths) - room, lengths[longest] - max(others, default=0)))
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]
