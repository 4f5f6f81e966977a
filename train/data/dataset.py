"""From a data file to what a model learns: tokens, which of them are learned, what is cut, what is held out.

Learned is the response and the end-of-text id behind it, so that the model also learns to stop (in ChatML
that id is the end of a turn). Three limits cut an example, and no end is ever made up:

- `source_max_len` cuts the beginning of the prompt, all that stands before the first response: what is asked,
  and the cue to answer it, stand at its end. The beginning-of-text id stays.
- `target_max_len` cuts a response's end; the example ends there, without an end-of-text id, because the
  response did not end there.
- `max_len` cuts the end of the whole.

An example without a token to learn is dropped, and counted.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from models.chat import render_chat
from models.errors import ConfigError, DataError
from models.tokenizer import Tokenizer
from train.data.batches import IGNORED, Tokenized
from train.data.example import Example
from train.data.examples import open_examples


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
    """Tokens before the first response; their beginning is cut, since their end is nearest to the answer."""
    target_max_len: int | None = None
    """Tokens of a response, its end-of-text id included; what is beyond is cut."""
    eval_size: int | float = 0.1
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
        if self.eval_size >= 1 and self.eval_size != int(self.eval_size):
            raise ValueError(f"eval_size is {self.eval_size}; give a share below 1 or a whole number")


@dataclass(frozen=True)
class Dataset:
    """What a data file came to: examples to train on, examples held out, and a record of both."""

    train: list[Tokenized]
    held_out: list[Tokenized]
    manifest: dict[str, Any]


def load_data(config: DataConfig, tokenizer: Tokenizer) -> Dataset:
    """Read, tokenize and split a file; examples without a token to learn are dropped and counted."""
    examples = open_examples(config.path, config.format)
    layout = examples.format
    tokenized = [tokenize(example, tokenizer, config, layout) for example in examples]
    kept = [t for t in tokenized if t.label_count]
    dropped = [t.where for t in tokenized if not t.label_count]
    if not kept:
        raise DataError(
            f"data: none of {len(tokenized)} examples has a token to learn after truncation to "
            f"{limits(config)} (first: {dropped[0]}). Raise data.max_len, or lower data.source_max_len"
        )
    train, held_out = split(kept, config.eval_size, config.seed)
    return Dataset(train, held_out, manifest(config, layout, train, held_out, dropped))


def limits(config: DataConfig) -> str:
    names = ("source_max_len", "target_max_len", "max_len")
    return ", ".join(f"{n}={getattr(config, n)}" for n in names if getattr(config, n) is not None) or "no limit"


def tokenize(example: Example, tokenizer: Tokenizer, config: DataConfig, layout: str = "") -> Tokenized:
    """Ids and labels of one example, cut to the configured limits.

    The first token is never learned: nothing stands before it to foretell it from. What stands behind the
    last token to learn is left out, since nothing is learned from it.
    """
    ids, learned = render(example, tokenizer, config, layout)
    wanted = sum(learned)

    bos = int(tokenizer.adds_bos and ids[:1] == [tokenizer.bos_token_id])
    over = 0
    if config.source_max_len is not None:
        over = max(0, learned.index(True) - bos - config.source_max_len)
    ids, learned = ids[:bos] + ids[bos + over :], learned[:bos] + learned[bos + over :]

    ends = [len(ids)] if config.max_len is None else [config.max_len]
    if config.target_max_len is not None:
        long = [start for start, stop in runs(learned) if stop - start > config.target_max_len]
        ends += [start + config.target_max_len for start in long[:1]]
    end = max((place + 1 for place, it in enumerate(learned[: min(ends)]) if it), default=0)
    ids, learned = ids[:end], learned[:end]

    cut = sum(learned) < wanted
    if config.train_on_source:
        learned = [True] * end
    learned = [False, *learned[1:]][:end]
    labels = [i if it else IGNORED for i, it in zip(ids, learned, strict=True)]
    return Tokenized(ids, labels, example.where, example.opening, over > 0, cut)


def render(example: Example, tokenizer: Tokenizer, config: DataConfig, layout: str) -> tuple[list[int], list[bool]]:
    """Ids of a whole example, and for each whether it belongs to a response to learn."""
    if example.prompt is not None and example.response is not None and config.template == "plain":
        if tokenizer.eos_token_id is None:
            raise ConfigError("data: this tokenizer has no end-of-text id, so a model could not learn to stop")
        # Encoded apart, so that the prompt has the ids that it will have when the model is to answer it.
        source, target = tokenizer.encode_pair(example.prompt, example.response)
        if tokenizer.adds_bos and tokenizer.bos_token_id is not None:
            source = [tokenizer.bos_token_id, *source]
        target = [*target, tokenizer.eos_token_id]
        return source + target, [False] * len(source) + [True] * len(target)
    style = config.chat_style or ("guanaco" if layout == "guanaco" else None)
    ids, learned = render_chat(tokenizer, list(example.messages), style)
    if example.last_only:
        start, _ = runs(learned)[-1]
        learned = [it and place >= start for place, it in enumerate(learned)]
    return ids, learned


def runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Where the stretches of true flags start and stop."""
    edges = [i for i, (a, b) in enumerate(zip([False, *flags], [*flags, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def split(examples: Sequence[Tokenized], size: int | float, seed: int) -> tuple[list[Tokenized], list[Tokenized]]:
    """Examples to train on and examples held out, both in the file's order; the seed decides which.

    Examples that open alike (one question with several answers, or with its follow-ups) stay together: a
    model that has learned an answer to a question is no measure of itself on another one. The held-out
    examples can be fewer than asked for where that leaves no group of the right size.
    """
    count = round(size * len(examples)) if size < 1 else int(size)
    count = max(count, 1) if size else 0
    if count >= len(examples):
        raise DataError(
            f"data: {len(examples)} usable examples cannot give {count} held-out ones; lower data.eval_size"
        )
    groups: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        groups.setdefault(example.opening or example.where, []).append(place)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    for group in order:
        if len(chosen) + len(group) <= count:
            chosen.update(group)
    if count and not chosen:
        raise DataError(
            f"data: no {count} of {len(examples)} examples can be held out, since more than that always open "
            f"alike ({examples[order[0][0]].where} and others); raise data.eval_size, or set it to 0"
        )
    train = [example for place, example in enumerate(examples) if place not in chosen]
    return train, [examples[place] for place in sorted(chosen)]


def manifest(
    config: DataConfig,
    layout: str,
    train: Sequence[Tokenized],
    held_out: Sequence[Tokenized],
    dropped: Sequence[str] = (),
) -> dict[str, Any]:
    """What became of a data file, for data/manifest.json."""
    used = [*train, *held_out]
    tokens, labels = sum(len(e.input_ids) for e in used), sum(e.label_count for e in used)
    content = Path(config.path).read_bytes()
    return {
        "file": Path(config.path).name,
        "sha256": sha256(content).hexdigest(),
        "bytes": len(content),
        "format": layout,
        "template": config.template,
        "records": len(used) + len(dropped),
        "dropped": len(dropped),
        "first_dropped": list(dropped[:5]),
        "cut_prompts": sum(e.cut_prompt for e in used),
        "cut_responses": sum(e.cut_response for e in used),
        "train": len(train),
        "held_out": len(held_out),
        "tokens": tokens,
        "label_tokens": labels,
        "label_share": round(labels / tokens, 4),
        "longest": max(len(e.input_ids) for e in used),
    }


def padding_id(tokenizer: Tokenizer) -> int:
    """The id to pad with. Where there is none any will do, since padding is masked and never learned."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)


def preview(examples: Sequence[Tokenized], tokenizer: Tokenizer, count: int = 3) -> str:
    """The first examples as training sees them: [[what is learned]] in double brackets, ids as text."""
    return "\n\n".join(f"{headline(e)}\n{marked(e, tokenizer)}" for e in examples[:count])


def headline(example: Tokenized) -> str:
    cuts = (["prompt cut"] if example.cut_prompt else []) + (["response cut"] if example.cut_response else [])
    size = f"{len(example.input_ids)} tokens, {example.label_count} learned"
    return f"--- {', '.join([example.where, size, *cuts])}"


def marked(example: Tokenized, tokenizer: Tokenizer) -> str:
    """An example's text. Each stretch is decoded for itself, so that a bracket stands between tokens."""
    text, done = "", 0
    for start, stop in runs([label != IGNORED for label in example.labels]):
        before, learned = example.input_ids[done:start], example.input_ids[start:stop]
        text += f"{shown(before, tokenizer)}[[{shown(learned, tokenizer)}]]"
        done = stop
    return text + shown(example.input_ids[done:], tokenizer)


def shown(ids: list[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(ids, skip_special=False)
