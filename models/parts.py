"""Ids of texts that have parts in common, such as prompts with the same examples: each part is encoded once.

A text may be cut where its ids are the same as those of its parts, one after the other. In byte-level BPE that is
wherever a word ends; all patterns end one between a letter or digit and a line end. In SentencePiece's BPE it is so
where no piece of the vocabulary holds a line end, which LLaMA writes as a byte: then nothing is ever joined across one.
Elsewhere a text is encoded whole.
"""

from functools import lru_cache

from models.bpe import CHUNK, ByteLevelBPE
from models.spm import SentencePieces
from models.tokenizer import Tokenizer

RECENT = 8  # whole texts: a prompt is asked for once for each of its continuations
KEPT = 2**13  # parts: more than the examples of all prompts of a benchmark have


class Parts:
    """Encodes as a tokenizer does, without special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.apart = ends_parts(tokenizer)
        self.whole = lru_cache(RECENT)(self.joined)
        self.first = lru_cache(KEPT)(lambda text: tokenizer.encode(text))
        self.later = lru_cache(KEPT)(lambda text: tokenizer.encode(text)[int(tokenizer.starts_with_space) :])

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.whole(text).copy()

    def joined(self, text: str) -> list[int]:
        parts = cut(text) if self.apart else [text]
        if max(map(len, parts)) > CHUNK // 4:  # long runs without a seam are cut in places that depend on the whole
            return self.tokenizer.encode(text)
        ids = self.first(parts[0]).copy()
        for part in parts[1:]:
            ids += self.later(part)
        return ids


def cut(text: str) -> list[str]:
    """A text's parts, each but the last ending in a letter or digit and each but the first beginning with a line end.

    >>> cut("Is it 4?\\nA. yes\\n\\nB. no")
    ['Is it 4?\\nA. yes', '\\n\\nB. no']
    """
    parts: list[str] = []
    begun: list[str] = []
    for line in text.split("\n"):
        if begun and begun[-1][-1:].isalnum():
            parts.append("\n".join(begun))
            begun = [""]
        begun.append(line)
    return [*parts, "\n".join(begun)]


def ends_parts(tokenizer: Tokenizer) -> bool:
    """Whether a text's ids are those of its parts, cut between a letter and a line end."""
    pieces = tokenizer.pieces
    if isinstance(pieces, SentencePieces):
        return pieces.lines_apart
    return isinstance(pieces, ByteLevelBPE)
