"""How many tokens a prompt may have, for prompts that are written to fit."""

from dataclasses import dataclass

from models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Room:
    """A number of tokens, and how they are counted: as the model reads a prompt, with the ids at its ends."""

    tokenizer: Tokenizer
    max_tokens: int
    eos: bool = False
    """Whether an end-of-text id stands behind a prompt, as behind a T5's source."""

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=self.tokenizer.adds_bos, eos=self.eos)

    def holds(self, text: str) -> bool:
        return len(self.encode(text)) <= self.max_tokens

    def cut(self, text: str) -> str:
        """A text that fits as it is; of another one, what its first tokens decode to."""
        ids = self.encode(text)
        return text if len(ids) <= self.max_tokens else self.tokenizer.decode(ids[: self.max_tokens])
