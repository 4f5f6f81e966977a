"""What generation asks of a model, whichever it is: to read, and then to go on token by token.

A `Decoding` holds a batch that is being written: keys and values of what is there, and what may be attended to. Two
kinds of model can write. LLaMA goes on from its prompt. T5 reads the prompt with its encoder, once, and its decoder
writes another text that begins with its start token.

Letters: B prompts, R rows (B, or each beam of each prompt), T prompt tokens, P tokens that the output opens with,
V vocabulary.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.errors import ConfigError
from models.llama import Llama
from models.model import Model
from models.t5 import T5


@runtime_checkable
class Decoding(Protocol):
    """A batch of texts that are being written."""

    opening: Int[Tensor, "B P"]
    """What the written texts begin with."""
    opening_mask: Tensor | None
    """(B, P): 0 where the opening is padding; None where it has none."""

    def first(self) -> Float[Tensor, "B V"]:
        """Logits of the token after the opening."""
        ...

    def following(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """Logits of the token after these, which come to the end of the rows."""
        ...

    def repeat(self, times: int) -> None:
        """Make as many adjacent rows of each."""
        ...

    def select(self, rows: Int[Tensor, " R"]) -> None:
        """Let each row go on from the one that is named for it, which is of the same prompt."""
        ...


def begin(model: Model, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None, max_new_tokens: int) -> Decoding:
    """The decoding of a batch of prompts; a model that cannot write is refused."""
    if isinstance(model, Llama):
        return CausalDecoding(model, input_ids, attention_mask, max_new_tokens)
    if isinstance(model, T5):
        return TranslatingDecoding(model, input_ids, attention_mask, max_new_tokens)
    raise ConfigError(
        f"{type(model).__name__} cannot generate: it reads a text and has no decoder to write one; "
        "generation needs a LLaMA or a T5"
    )


class CausalDecoding:
    """LLaMA going on from its prompts.

    Prompts of different length are brought to end together (padding moves to the left), so that every step adds one
    column for all of them; positions and attention leave the padding out, and each row gets what it would get alone.
    """

    def __init__(
        self, model: Llama, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None, max_new_tokens: int
    ) -> None:
        self.model = model
        self.opening, self.opening_mask = input_ids, attention_mask
        self.cache = model.new_cache(input_ids.shape[0], input_ids.shape[1] + max_new_tokens)
        self.prompts, self.mask = input_ids, None
        if attention_mask is not None and not bool(attention_mask.bool().all()):
            self.prompts, self.mask = pad_left(input_ids, attention_mask)

    def first(self) -> Float[Tensor, "B V"]:
        return self.logits(self.prompts)

    def following(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return self.logits(tokens[:, None])

    def logits(self, step: Int[Tensor, "R new"]) -> Float[Tensor, "R V"]:
        return self.model.head(self.model.hidden(step, self.mask, self.cache)[:, -1]).float()

    def repeat(self, times: int) -> None:
        self.cache.repeat(times)
        self.mask = None if self.mask is None else self.mask.repeat_interleave(times, dim=0)

    def select(self, rows: Int[Tensor, " R"]) -> None:
        self.cache.select(rows)  # the mask is that of the prompt


class TranslatingDecoding:
    """T5 writing one text for each that its encoder has read."""

    def __init__(
        self, model: T5, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None, max_new_tokens: int
    ) -> None:
        self.model, self.mask = model, attention_mask
        self.opening = input_ids.new_full((input_ids.shape[0], 1), model.config.decoder_start_token_id)
        self.opening_mask = None
        self.cache = model.new_cache(model.encode(input_ids, attention_mask), 1 + max_new_tokens)

    def first(self) -> Float[Tensor, "B V"]:
        return self.following(self.opening[:, 0])

    def following(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        hidden = self.model.decode(tokens[:, None], None, self.mask, cache=self.cache)
        return self.model.head(hidden[:, -1]).float()

    def repeat(self, times: int) -> None:
        self.cache.repeat(times)
        self.mask = None if self.mask is None else self.mask.repeat_interleave(times, dim=0)

    def select(self, rows: Int[Tensor, " R"]) -> None:
        self.cache.select(rows)


def ends(attention_mask: Tensor) -> list[int]:
    """One past the last real token of every row."""
    T = attention_mask.shape[1]
    return (T - attention_mask.bool().flip(1).int().argmax(dim=1)).tolist()


def pad_left(input_ids: Int[Tensor, "B T"], attention_mask: Tensor) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Prompts and mask with every row's last real token in the last column."""
    T = input_ids.shape[1]
    shifts = [T - end for end in ends(attention_mask)]
    ids = torch.stack([row.roll(shift) for row, shift in zip(input_ids, shifts, strict=True)])
    mask = torch.stack([row.roll(shift) for row, shift in zip(attention_mask, shifts, strict=True)])
    return ids, mask.long()
