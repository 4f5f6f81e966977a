"""A vocabulary of whole words: fairseq's dictionary where no BPE stands before it.

As in fairseq, a text is cut at white space and nowhere else, a word that is not in the dictionary is unknown, and the
id of a word is its line plus 4: before the first line stand <s>, <pad>, </s> and <unk>, and behind the last <mask>.
A protein is thus written with spaces between its residues, "M K V".
"""

from collections.abc import Iterable

BEFORE = ("<s>", "<pad>", "</s>", "<unk>")
BEHIND = "<mask>"
MANY = 10_000  # GPT-2's numbers go to 50256; units of speech, which are words in numbers, to some thousands


class Words:
    """The words of a dictionary, in the order of its lines, and text to ids and back."""

    def __init__(self, words: list[str]) -> None:
        self.special = dictionary_specials(len(words))
        twice = [word for word in words if word in self.special]
        if twice:
            raise ValueError(f'it lists "{twice[0]}", which stands in every dictionary without being listed')
        if words_of_bpe(words):
            raise ValueError(
                "its symbols are numbers of GPT-2's tokens, not words; put encoder.json and vocab.bpe beside it"
            )
        self.ids = {word: line + len(BEFORE) for line, word in enumerate(words)}
        self.word_of = {id: word for word, id in self.ids.items()}
        self.unknown = self.special["<unk>"]

    def encode(self, text: str) -> list[int]:
        """The id of every word; special tokens spelled in a text are unknown words."""
        return [self.ids.get(word, self.unknown) for word in text.split()]

    def decode(self, ids: Iterable[int], names: dict[int, str]) -> str:
        """Words with single spaces between them, with `names` for the ids given there."""
        return " ".join(names[id] if id in names else self.word_of[id] for id in ids)


def dictionary_specials(lines: int) -> dict[str, int]:
    """The special tokens of a dictionary of so many lines, with their ids."""
    return {token: id for id, token in enumerate(BEFORE)} | {BEHIND: len(BEFORE) + lines}


def words_of_bpe(words: list[str]) -> bool:
    """Are these GPT-2's token numbers, by frequency? Some files fill up with made-up words to round their count."""
    numbers = [word for word in words if not word.startswith("madeupword")]
    return all(word.isdecimal() for word in numbers) and max(map(int, numbers), default=0) >= MANY
