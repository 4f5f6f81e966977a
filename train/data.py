"""From examples to batches: tokens, which of them are learned, what is cut, in which order.

Learned is the response and the end-of-text id behind it, so that the model also learns to stop; a response
that was cut has no end, and gets none. Padding is known by its place, never by its id: many tokenizers pad
with the end-of-text id itself.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from models.chat import render_chat
from models.errors import ConfigError, DataError
from models.tokenizer import Tokenizer
from train.formats import Example, read_examples

IGNORED = -100  # a label that the loss leaves out


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and what of it."""

    path: str
    """File of records: JSON, JSONL, CSV or TSV."""
    format: str | None = None
    """Layout of the records; found from their keys by default."""
    template: Literal["plain", "chat"] = "plain"
    """How a prompt and its response are joined: as they are, or as a chat. Conversations are always chats."""
    chat_style: Literal["chatml", "guanaco"] | None = None
    """Form of a chat: the tokenizer's own by default, Guanaco's for Guanaco's records."""
    train_on_source: bool = False
    """Learn the prompt too."""
    max_len: int | None = None
    """Tokens of an example; what is beyond is cut."""
    source_max_len: int | None = None
    """Tokens of a plain prompt; its beginning is cut, since its end is nearest to the answer."""
    target_max_len: int | None = None
    """Tokens of a plain response; its end is cut."""
    eval_size: float = 0.1
    """Examples held out: a share below 1, or a number."""
    group_by_length: bool = True
    """Put examples of like length together, which saves padding."""
    seed: int = 42
    """Decides which examples are held out, and their order."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path must name a data file")
        for name in ("max_len", "source_max_len", "target_max_len"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name} is {value}; at least 2 tokens are needed")
        if not self.eval_size >= 0:
            raise ValueError(f"eval_size is {self.eval_size}; it must be 0 or more")


@dataclass(frozen=True)
class Tokenized:
    """One example as the model sees it: ids, and the id or IGNORED at each place."""

    input_ids: list[int]
    labels: list[int]
    cut: bool
    where: str


@dataclass(frozen=True)
class Dataset:
    """What a data file came to: examples to train on, examples held out, and a record of both."""

    train: list[Tokenized]
    held_out: list[Tokenized]
    manifest: dict[str, Any]


def load_data(config: DataConfig, tokenizer: Tokenizer) -> Dataset:
    """Read, tokenize and split a file; examples without a token to learn are dropped and counted."""
    examples, layout = read_examples(config.path, config.format)
    tokenized = [tokenize(example, tokenizer, config, layout) for example in examples]
    kept = [t for t in tokenized if any(label != IGNORED for label in t.labels[1:])]
    if not kept:
        raise DataError(
            f"{tokenized[0].where}: no token to learn is left of this record, nor of the other "
            f"{len(tokenized) - 1}; raise data.max_len or data.target_max_len"
        )
    train, held_out = split(kept, config.eval_size, config.seed)
    dropped = [t.where for t in tokenized if not any(label != IGNORED for label in t.labels[1:])]
    labels = sum(label != IGNORED for t in kept for label in t.labels)
    tokens = sum(len(t.input_ids) for t in kept)
    manifest = {
        "file": Path(config.path).name,
        "sha256": sha256(Path(config.path).read_bytes()).hexdigest(),
        "format": layout,
        "records": len(examples),
        "dropped": len(dropped),
        "first_dropped": dropped[:5],
        "cut": sum(t.cut for t in kept),
        "train": len(train),
        "held_out": len(held_out),
        "tokens": tokens,
        "label_tokens": labels,
        "label_share": round(labels / tokens, 4),
    }
    return Dataset(train, held_out, manifest)


def tokenize(example: Example, tokenizer: Tokenizer, config: DataConfig, layout: str = "") -> Tokenized:
    """Ids and labels of one example, cut to the configured limits."""
    if example.prompt is None or config.template == "chat":
        ids, trained, cut = chat_tokens(example, tokenizer, config, layout)
    else:
        ids, trained, cut = plain_tokens(example, tokenizer, config)
    if config.max_len is not None and len(ids) > config.max_len:
        ids, trained, cut = ids[: config.max_len], trained[: config.max_len], True
    labels = [i if t or config.train_on_source else IGNORED for i, t in zip(ids, trained, strict=True)]
    return Tokenized(ids, labels, cut, example.where)


def plain_tokens(example: Example, tokenizer: Tokenizer, config: DataConfig) -> tuple[list[int], list[bool], bool]:
    """Prompt and response end to end; the tokenizer's beginning-of-text id stays in front of a cut prompt."""
    assert example.prompt is not None
    assert example.response is not None
    source, target = tokenizer.encode_pair(example.prompt, example.response)
    target = [*target, tokenizer.needed("eos_token_id")]
    cut = False
    if config.source_max_len is not None and len(source) > config.source_max_len:
        source, cut = source[-config.source_max_len :], True
    if config.target_max_len is not None and len(target) > config.target_max_len:
        target, cut = target[: config.target_max_len], True
    if tokenizer.adds_bos:
        source = [tokenizer.needed("bos_token_id"), *source]
    return source + target, [False] * len(source) + [True] * len(target), cut


def chat_tokens(
    example: Example, tokenizer: Tokenizer, config: DataConfig, layout: str
) -> tuple[list[int], list[bool], bool]:
    """The conversation in the model's form; what the assistant says is learned, with the end of its turn."""
    if config.source_max_len is not None or config.target_max_len is not None:
        raise ConfigError(
            "data: source_max_len and target_max_len are for plain prompts and responses; a conversation takes max_len"
        )
    style = config.chat_style or ("guanaco" if layout == "guanaco" else None)
    messages = list(example.messages)
    ids, trained = render_chat(tokenizer, messages, style)
    if example.last_only:
        before, _ = render_chat(tokenizer, messages[:-1], style, add_generation_prompt=True)
        trained = [t and place >= len(before) for place, t in enumerate(trained)]
    return ids, trained, False


def split(examples: list[Tokenized], size: float, seed: int) -> tuple[list[Tokenized], list[Tokenized]]:
    """Examples to train on and examples held out, both in the file's order; the seed decides which."""
    count = round(size * len(examples)) if size < 1 else int(size)
    if 0 < size < 1:
        count = max(count, 1)
    if count >= len(examples):
        raise DataError(
            f"data: {len(examples)} usable examples cannot give {count} held-out ones; lower data.eval_size"
        )
    chosen = set(random.Random(seed).sample(range(len(examples)), count))
    train = [e for i, e in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]


class Batches:
    """Padded batches in an order that the seed and the epoch's number alone decide."""

    def __init__(
        self,
        examples: Sequence[Tokenized],
        batch_size: int,
        pad_id: int,
        seed: int | None = None,
        group_by_length: bool = False,
    ) -> None:
        """Without a seed the order is the file's (or by length), every epoch."""
        self.examples, self.batch_size, self.pad_id = examples, batch_size, pad_id
        self.seed, self.group_by_length = seed, group_by_length

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def epoch(self, number: int) -> Iterator[dict[str, Tensor]]:
        """The batches of an epoch, counted from 0."""
        for rows in self.order(number):
            yield collate([self.examples[i] for i in rows], self.pad_id)

    def order(self, number: int) -> list[list[int]]:
        """Which examples each batch of an epoch holds."""
        order = list(range(len(self.examples)))
        draw = None if self.seed is None else random.Random(f"{self.seed}/{number}")
        if draw is not None:
            draw.shuffle(order)
        if self.group_by_length:
            # Sorted in pools of many batches, so that an example's company still changes every epoch.
            pool = self.batch_size * (50 if draw is not None else len(order) + 1)
            pools = [order[i : i + pool] for i in range(0, len(order), pool)]
            order = [i for p in pools for i in sorted(p, key=lambda i: -len(self.examples[i].input_ids))]
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.group_by_length and draw is not None:
            draw.shuffle(batches)
        return batches


def collate(examples: Sequence[Tokenized], pad_id: int) -> dict[str, Tensor]:
    """Examples of different length as (B, T) tensors, padded on the right."""
    width = max(len(e.input_ids) for e in examples)
    shape = (len(examples), width)
    ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        ids[row, :n] = torch.tensor(example.input_ids)
        labels[row, :n] = torch.tensor(example.labels)
        mask[row, :n] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def preview(examples: Sequence[Tokenized], tokenizer: Tokenizer, count: int = 3) -> str:
    """The first examples as training sees them: [[what is learned]] in double brackets, ids as text."""
    return "\n\n".join(f"--- {e.where}\n{marked(e, tokenizer)}" for e in examples[:count])


def marked(example: Tokenized, tokenizer: Tokenizer) -> str:
    text, run, learned = "", list[int](), False
    for i, label in zip(example.input_ids, example.labels, strict=True):
        if (label != IGNORED) != learned:
            text, run, learned = text + bracketed(run, learned, tokenizer), [], not learned
        run.append(i)
    return text + bracketed(run, learned, tokenizer)


def bracketed(ids: list[int], learned: bool, tokenizer: Tokenizer) -> str:
    text = tokenizer.decode(ids, skip_special=False)
    return f"[[{text}]]" if learned else text
