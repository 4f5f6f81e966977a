"""How probable a model finds a text, given what stands before it.

Continuations of one token after the same context, such as the letters of a multiple choice, take one row of a batch
among them: the logits behind the context tell all of them. So do others that begin alike (`in_one_row`).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from eval.examinee import Examinee
from eval.scoring import token_log_probabilities
from models import ConfigError, DataError, Llama
from models.t5 import T5


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The answer is [log-probability of the continuation in nats, is it what greedy decoding would write]."""

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    context: str = field(compare=False)
    continuation: str = field(compare=False)
    cut: int = field(default=0, compare=False)
    """Tokens of the context that there was no room for."""
    longer: tuple[int, ...] = field(default=(), compare=False)
    """A continuation that this one begins, but for its last token, and whose row of a batch it can share."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.context, self.continuation

    @property
    def key(self) -> tuple[Any, ...]:
        return "likelihood", self.context_ids, self.continuation_ids

    @property
    def behind(self) -> tuple[int, ...]:
        """What the row's input has behind the context: the last token of a continuation is never an input."""
        return (self.longer or self.continuation_ids)[:-1]

    @property
    def row(self) -> Hashable:
        return "likelihood", self.context_ids, self.behind

    @property
    def length(self) -> int:
        return len(self.context_ids) + len(self.behind)

    @classmethod
    def answer(cls, examinee: Examinee, rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
        return answer_rows(examinee, rows)


def likelihood(
    examinee: Examinee,
    context: str,
    continuation: str,
    keep: Literal["end", "start"] = "end",
    room: int | None = None,
    ends: bool = False,
) -> Likelihood:
    """The question how probable a continuation is; with `ends` the end-of-text token, if there is one, is part of it.

    Of a context that there is no room for, the end is kept, as in the harness, or the start. `room` is the most tokens
    of the context, where that is to be less than the model takes.
    """
    before, after = examinee.pair(context, continuation)
    if not after:
        raise DataError(f"the continuation {continuation!r} has no tokens of its own after {context[-40:]!r}")
    if not before:
        raise ConfigError(
            "a text after nothing needs a beginning- or end-of-text token, and this tokenizer has neither"
        )
    if ends and examinee.tokenizer.eos_token_id is not None:
        after = [*after, examinee.tokenizer.eos_token_id]
    if examinee.architecture == "t5":
        most = examinee.max_tokens
    else:  # the last token of a continuation is never an input
        most = examinee.max_tokens + 1 - len(after)
    most = most if room is None else min(most, room)
    if most < 1:
        raise DataError(f"a continuation has {len(after)} tokens, but the model takes {examinee.max_tokens} at once")
    kept = before[-most:] if keep == "end" else before[:most]
    return Likelihood(
        context_ids=tuple(kept),
        continuation_ids=tuple(after),
        context=context,
        continuation=continuation,
        cut=len(before) - len(kept),
    )


def in_one_row(requests: Sequence[Likelihood]) -> list[Likelihood]:
    """The same questions, of which those that one row of a batch can answer together are marked so."""
    longest = max(requests, key=lambda it: len(it.continuation_ids))

    def fits(it: Likelihood) -> bool:
        begun = it.continuation_ids[:-1]
        return it.context_ids == longest.context_ids and longest.continuation_ids[: len(begun)] == begun

    return [replace(it, longer=longest.continuation_ids) if fits(it) else it for it in requests]


def rolling(examinee: Examinee, text: str, window: int | None = None) -> list[Likelihood]:
    """The questions whose log-probabilities sum up to that of a whole text.

    The harness's windows: each predicts as many tokens as the model takes at once (or `window`, if that is given),
    given one token before them, which for the first window is the prefix; the last window reaches back to fill up,
    and predicts only what is new.
    """
    if examinee.architecture != "llama":
        raise ConfigError("the probability of a whole text needs a causal language model (LLaMA)")
    ids = examinee.tokenizer.encode(text)
    if not ids:
        raise DataError("a text is empty; its probability needs at least one token")
    whole, size = [*examinee.prefix, *ids], window or examinee.max_tokens
    skipped = len(whole) - len(ids)  # 0 where a vocabulary has nothing to begin a text with: the first id is given
    if len(whole) < 2:
        raise DataError(f"the text {text!r} is one token, and this tokenizer has none that could stand before it")
    windows = []
    for begin in range(max(skipped, 1), len(whole), size):
        end = min(begin + size, len(whole))
        context = whole[max(0, end - 1 - size) : begin] if begin > size else whole[:begin]
        windows.append(
            Likelihood(
                context_ids=tuple(context),
                continuation_ids=tuple(whole[begin:end]),
                context="",
                continuation=text if begin <= 1 else "",
            )
        )
    return windows


@torch.inference_mode()
def answer_rows(examinee: Examinee, rows: Sequence[Sequence[Likelihood]]) -> list[list[Any]]:
    """Log-probabilities and greediness for the requests of each row, in one pass through the model."""
    model = examinee.model
    first = [group[0] for group in rows]
    if isinstance(model, Llama):
        inputs = [[*it.context_ids, *it.behind] for it in first]
        ids, mask = padded(inputs, model.device)
        hidden = model.hidden(ids, mask)
        starts = [len(it.context_ids) - 1 for it in first]
    elif isinstance(model, T5):
        ids, mask = padded([it.context_ids for it in first], model.device)
        begun = model.config.decoder_start_token_id
        decoder, _ = padded([[begun, *it.behind] for it in first], model.device)
        hidden = model.decode(decoder, model.encode(ids, mask), mask)
        starts = [0] * len(first)
    else:
        raise ConfigError(f"probabilities of texts need a model that writes, but this one is {type(model).__name__}")

    places, targets = [], []  # of every token of every continuation
    for row, (start, group) in enumerate(zip(starts, rows, strict=True)):
        for it in group:
            places += [(row, start + step) for step in range(len(it.continuation_ids))]
            targets += it.continuation_ids
    values, greedy = token_log_probabilities(model, hidden, places, targets)
    answers, at = [], 0
    for group in rows:
        found = []
        for it in group:
            end = at + len(it.continuation_ids)
            found.append([values[at:end].double().sum().item(), bool(greedy[at:end].all())])
            at = end
        answers.append(found)
    return answers


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids filled up on the right, and which of them are real."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask
