"""What a model writes after a prompt, up to a stop text, the end-of-text token or a number of tokens."""

import secrets
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from eval.examinee import Examinee
from models import ConfigError, DataError, Llama, Sampling, stream
from models.t5 import T5

LOOK_EVERY = 8  # steps between looks for a stop text: decoding all that is written costs time


@dataclass(frozen=True, kw_only=True)
class Generate:
    """The answer is the text that was written, without the prompt, the stop text and special tokens."""

    ids: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    seed: int | None = None
    prompt: str = field(compare=False)
    cut: int = field(default=0, compare=False)
    """Tokens of the prompt that there was no room for."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.prompt, {"until": list(self.stop), "max_gen_toks": self.max_new_tokens, **asdict(self.sampling)}

    @property
    def key(self) -> tuple[Any, ...]:
        return "generate", self.ids, self.max_new_tokens, self.stop, asdict(self.sampling), self.seed

    @property
    def row(self) -> Hashable:
        return "generate", self

    @property
    def length(self) -> int:
        return len(self.ids) + self.max_new_tokens

    @classmethod
    def answer(cls, examinee: Examinee, rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
        requests = [group[0] for group in rows]
        together: dict[Any, list[int]] = {}  # a batch shares its settings; draws are each row's own
        for number, it in enumerate(requests):
            together.setdefault((it.max_new_tokens, it.stop, it.sampling), []).append(number)
        texts = [""] * len(rows)
        for numbers in together.values():
            for number, text in zip(numbers, written(examinee, [requests[n] for n in numbers]), strict=True):
                texts[number] = text
        return [[text] * len(group) for text, group in zip(texts, rows, strict=True)]


def generation(
    examinee: Examinee,
    prompt: str,
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    sampling: Sampling = Sampling(),
    seed: int | None = None,
    ids: Sequence[int] | None = None,
) -> Generate:
    """The question what a model writes after a prompt, of which the end is kept where it is too long.

    `ids` stand for a prompt that is more than one text, such as a chat.
    """
    ids = examinee.prompted(prompt) if ids is None else ids
    room = examinee.max_tokens - (0 if examinee.architecture == "t5" else max_new_tokens)
    if room < 1:
        raise DataError(f"{max_new_tokens} tokens are to be written, but the model takes {examinee.max_tokens} at once")
    return Generate(
        ids=tuple(ids[-room:]),
        max_new_tokens=max_new_tokens,
        stop=stop,
        sampling=sampling,
        seed=seed,
        prompt=prompt,
        cut=max(0, len(ids) - room),
    )


@torch.inference_mode()
def written(examinee: Examinee, requests: Sequence[Generate]) -> list[str]:
    """The texts of some requests with the same settings, in one batch."""
    model, tokenizer, first = examinee.model, examinee.tokenizer, requests[0]
    if not isinstance(model, Llama | T5):
        raise ConfigError(f"this task needs a model that writes, but this one is {type(model).__name__}")
    longest = max(len(it.ids) for it in requests)
    ids = torch.tensor([[0] * (longest - len(it.ids)) + list(it.ids) for it in requests], device=model.device)
    mask = torch.tensor([[0] * (longest - len(it.ids)) + [1] * len(it.ids) for it in requests], device=model.device)
    ends, known = set(model.config.eos_token_id), tokenizer.vocab_size
    rows: list[list[int]] = [[] for _ in requests]
    open_rows = set(range(len(rows)))
    seeds = [secrets.randbits(63) if it.seed is None else it.seed for it in requests]
    columns = stream(model, ids, mask, max_new_tokens=first.max_new_tokens, sampling=first.sampling, seed=seeds)
    for step, column in enumerate(columns, 1):
        for number, id in enumerate(column.tolist()):
            if number in open_rows and id in ends:
                open_rows.discard(number)
            elif number in open_rows and id < known:  # some embeddings have more rows than there are tokens
                rows[number].append(id)
        if first.stop and step % LOOK_EVERY == 0:
            open_rows = {n for n in open_rows if not any(mark in tokenizer.decode(rows[n]) for mark in first.stop)}
        if not open_rows:
            break
    return [before_stop(tokenizer.decode(row), first.stop) for row in rows]


def before_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of some marks.

    >>> before_stop("Paris.\\nQuestion: and", ("\\n", "Q"))
    'Paris.'
    """
    return text[: min((text.find(mark) for mark in stop if mark in text), default=len(text))]
