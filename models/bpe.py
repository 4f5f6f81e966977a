"""Byte-level BPE: every text is bytes, so nothing is unknown, and a token is a run of bytes.

A regular expression first cuts a text into words; within each word the pair of neighbours whose merge
was learned earliest is joined, again and again (tiktoken does this part). Two numberings must be kept
apart: the *rank* of a token is when its merge was learned and decides what is joined; its *id* is its
row in the embedding, and comes from the vocabulary table. They differ for RoBERTa, whose ids follow
the frequencies of words, and wherever special tokens stand first.

Files spell bytes as printable characters (GPT-2's alphabet: a space is "Ġ"); `byte_of` maps back.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cached_property

# How each family cuts a text into words. GPT-2 lets a word carry the space before it; SmolLM2 does too but
# sets every digit apart; Llama 3 groups digits by three and lets words carry other characters than spaces.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "smollm": r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

# tiktoken's regular expressions give up on half a million spaces in a row, and older releases take quadratic
# time for one long word, so a text is handed over in chunks. All patterns end a word where a letter or digit
# is followed by something else, so a chunk that ends there changes no id; only a run without such a place,
# half as long as this number of characters, is cut by force.
CHUNK = 16384
WORD_END = re.compile(r"[^\W_](?=[\W_])")


class ByteLevelBPE:
    """The tokens that merges can make, their order, and their ids."""

    def __init__(self, ranks: dict[bytes, int], ids: dict[bytes, int], pattern: str, missing: int | None = None):
        """Take tokens in the order of their merges (`ranks`) and their ids.

        A token that has a rank but no id becomes `missing`, or nothing. `ids` may hold further tokens, which
        no text is ever encoded to but which decode.
        """
        # tiktoken panics on a byte without a rank (SmolLM2 lacks 21 of them), so those get placeholder ranks
        self.ranks = dict(ranks)
        last = max(ranks.values(), default=-1)
        absent = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        self.ranks.update((byte, last + 1 + i) for i, byte in enumerate(absent))

        self.ids = ids
        self.pattern = pattern
        self.missing = missing
        self.bytes_of = {id: token for token, id in ids.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of a text; bytes for which the vocabulary has nothing are left out."""
        encoding, id_of = self._encoding, self._id_of_rank
        ids = [id_of[rank] for chunk in chunks(text) for rank in encoding.encode_ordinary(chunk)]
        return [id for id in ids if id >= 0] if self._drops else ids

    def decode(self, ids: Iterable[int], names: dict[int, str]) -> str:
        """The text of ids, with `names` for those given there; broken UTF-8 shows as U+FFFD."""
        tokens = (names[id].encode(errors="replace") if id in names else self.bytes_of[id] for id in ids)
        return b"".join(tokens).decode("utf-8", errors="replace")

    @cached_property
    def _encoding(self):
        import tiktoken  # here, so that models can be imported without it

        return tiktoken.Encoding(
            self.pattern, pat_str=PATTERNS[self.pattern], mergeable_ranks=self.ranks, special_tokens={}
        )

    @cached_property
    def _id_of_rank(self) -> list[int]:
        missing = -1 if self.missing is None else self.missing
        table = [missing] * (max(self.ranks.values()) + 1)
        for token, rank in self.ranks.items():
            table[rank] = self.ids.get(token, missing)
        return table

    @cached_property
    def _drops(self) -> bool:
        return -1 in self._id_of_rank


def chunks(text: str, size: int = CHUNK) -> Iterator[str]:
    """Parts of at most `size` characters that together are the text, each ending with a word where it can."""
    start = 0
    while len(text) - start > size:
        word_end = WORD_END.search(text, start + size // 2, start + size)
        end = word_end.end() if word_end else start + size
        yield text[start:end]
        start = end
    yield text[start:]


def merge_ranks(vocab: Iterable[str], merges: list[tuple[str, str]]) -> dict[bytes, int]:
    """Ranks of all bytes of the vocabulary, then of what each merge makes, in order.

    A merge of, or into, something that the vocabulary lacks is a ValueError.
    """
    known = set(vocab)
    ranks = {bytes([byte]): rank for rank, byte in enumerate(b for c, b in byte_of.items() if c in known)}
    for line, (left, right) in enumerate(merges, 1):
        for token in (left, right, left + right):
            if token not in known:
                raise ValueError(f'merge {line}, "{left} {right}", needs "{token}", which the vocabulary lacks')
        merged = spelled_bytes(left + right)
        if merged is None:
            raise ValueError(f'merge {line}, "{left} {right}", is not spelled in GPT-2\'s byte alphabet')
        ranks.setdefault(merged, len(ranks))
    return ranks


def token_ids(vocab: dict[str, int]) -> dict[bytes, int]:
    """Ids by the bytes of each token; one that is not spelled in the byte alphabet is taken as plain text."""
    ids: dict[bytes, int] = {}
    for token, id in vocab.items():
        spelled = spelled_bytes(token)
        ids.setdefault(token.encode("utf-8", "replace") if spelled is None else spelled, id)
    return ids


def unmerged(vocab: Iterable[str], merges: list[tuple[str, str]]) -> list[str]:
    """Tokens that no text can be encoded to, being neither a byte nor made by a merge: the special ones."""
    made = {left + right for left, right in merges}
    return [token for token in vocab if token not in made and token not in byte_of]


def guess_pattern(vocab: Iterable[str], merges: list[tuple[str, str]]) -> str:
    """Which pattern a vocabulary was trained with, when nothing but its tokens says so.

    Llama 3's special tokens name it. Otherwise the merges tell: under GPT-2's pattern digits merge with the
    space before them and with each other, and among its first 300 merges there is one such; where digits are
    set apart, as in SmolLM2, no merge contains a digit at all.
    """
    if "<|begin_of_text|>" in vocab:
        return "llama3"
    digits_merge = any(c in "0123456789" for left, right in merges for c in left + right)
    return "gpt2" if digits_merge else "smollm"


def spelled_bytes(token: str) -> bytes | None:
    """The bytes that a token of a vocabulary file stands for, or None where it is not in the alphabet."""
    try:
        return bytes([byte_of[c] for c in token])
    except KeyError:
        return None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


byte_of = _byte_alphabet()
