"""Who is examined: a model with its tokenizer, and how a context and what may follow it become ids."""

from dataclasses import dataclass
from functools import cached_property

from models import Model, Tokenizer, render_chat

UNLIMITED = 2048  # tokens that a model takes at once which has no limit of its own, as in the harness


@dataclass(frozen=True, kw_only=True)
class Examinee:
    """What a task may ask of whom it examines."""

    tokenizer: Tokenizer
    architecture: str
    """llama, t5 or roberta, as `models.checkpoint.describe` says it."""
    max_tokens: int = UNLIMITED
    """The longest input, in tokens."""
    loaded: Model | None = None
    """None where only prompts are wanted."""
    identity: str = ""
    """What tells its answers from those of any other model: weights, format, adapter, precision."""
    chat: bool = False
    """Prompts go in the model's chat form."""

    @property
    def model(self) -> Model:
        if self.loaded is None:
            raise RuntimeError("no model is loaded; only prompts can be had")
        return self.loaded

    @cached_property
    def prefix(self) -> list[int]:
        """What stands before a text that has nothing before it: the beginning-of-text id, else the end-of-text id."""
        id = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        return [] if id is None else [id]

    def encode(self, text: str) -> list[int]:
        """A text's ids, with the beginning-of-text id where this tokenizer was trained with one."""
        return self.tokenizer.encode(text, bos=self.tokenizer.adds_bos)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what follows it: both are encoded as one text, which is split where the context ends.

        So a letter after "Answer:" has the id that it has within a text. Spaces at a context's end belong to what
        follows, because tokens begin with their space. An empty context is the prefix.
        """
        if self.architecture == "t5":
            return self.tokenizer.encode(context, eos=True), self.tokenizer.encode(continuation)
        if self.chat:
            return self.opened(context), self.tokenizer.encode(continuation.removeprefix(" "))
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not context:
            return self.prefix, self.tokenizer.encode(continuation)
        whole, before = self.encode(context + continuation), self.encode(context)
        return whole[: len(before)], whole[len(before) :]

    def opened(self, message: str) -> list[int]:
        """Ids of a user's message in the model's chat form, up to where the answer begins."""
        return render_chat(self.tokenizer, [{"role": "user", "content": message}], add_generation_prompt=True)[0]

    def prompted(self, text: str) -> list[int]:
        """Ids of a text that the model is to go on from, or to answer."""
        if self.architecture == "t5":
            return self.tokenizer.encode(text, eos=True)
        return self.opened(text) if self.chat else self.encode(text) or self.prefix
