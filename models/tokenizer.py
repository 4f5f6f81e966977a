"""Text to token ids and back, whichever files a checkpoint brings its vocabulary in.

There are three kinds of vocabulary, byte-level BPE (`models/bpe.py`), SentencePiece (`models/spm.py`) and plain
words (`models/words.py`); a `Tokenizer` is one of them with its special tokens. Those are never made from text: a
user who types "</s>" gets the characters, and only code (`encode(eos=True)`, `render_chat`) inserts the id.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

from models.bpe import ByteLevelBPE
from models.errors import CheckpointError, NoTokenizerError
from models.spm import SentencePieces
from models.tokenizer_files import TokenizerParts, read_tokenizer_files, tokenizer_parts, vocabulary_in
from models.words import Words


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """The tokenizer of a checkpoint directory, a tokenizer file or a .gguf file.

    A directory is searched for `tokenizer.model` (SentencePiece, or Llama 3's tiktoken format),
    `spiece.model`, `tokenizer.json`, `vocab.json` + `merges.txt`, `encoder.json` + `vocab.bpe` (RoBERTa's ids
    with fairseq's `dict.txt`), `dict.txt` alone (whole words), in this order. The path of a checkpoint's weights
    stands for their directory.
    """
    files, where = read_tokenizer_files(Path(path))
    return Tokenizer(tokenizer_parts(files, where))


def find_tokenizer(path: str | Path) -> "Tokenizer | None":
    """The tokenizer of a checkpoint that is to be copied; None, with a line in the log, where it has none."""
    try:
        return load_tokenizer(path)
    except NoTokenizerError as error:
        logging.getLogger(__name__).warning("%s. No tokenizer is written either", error)
        return None


def save_tokenizer(tokenizer: "Tokenizer", directory: str | Path) -> None:
    """Write files from which `load_tokenizer` makes an equal tokenizer.

    They are those it was loaded from, except that `tokenizer_config.json` then names all special tokens.
    From a GGUF file they are written in the usual formats.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    there = vocabulary_in({file.name for file in directory.iterdir()} | tokenizer.files.keys())
    if there != vocabulary_in(tokenizer.files):
        raise CheckpointError(
            f"{directory} already holds {' and '.join(there)}, which would be read instead of the saved"
            f" {' and '.join(vocabulary_in(tokenizer.files))}; remove it or save somewhere else"
        )
    for name, content in tokenizer.files.items():
        (directory / name).write_bytes(content)


class Tokenizer:
    """A vocabulary and its special tokens."""

    pieces: ByteLevelBPE | SentencePieces | Words
    special_tokens: dict[str, int]
    """Tokens that no text is encoded to, with their ids."""
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    vocab_size: int
    """One more than the highest id. A model's embedding may have more rows."""
    chat_template: str | None
    """The template that the files hold, as text; `render_chat` only looks at which family it is."""
    starts_with_space: bool
    """Whether `encode` puts a space before every text, as SentencePiece does."""
    files: dict[str, bytes]
    """What `save_tokenizer` writes."""

    def __init__(self, parts: TokenizerParts):
        self.pieces = parts.pieces
        self.special_tokens = parts.special
        self.bos_token_id, self.eos_token_id = parts.roles["bos"], parts.roles["eos"]
        self.pad_token_id, self.unk_token_id = parts.roles["pad"], parts.roles["unk"]
        self.chat_template = parts.chat_template
        self.files = parts.files

        self._names = {id: name for name, id in parts.special.items()}
        if isinstance(parts.pieces, SentencePieces):
            self.starts_with_space = parts.pieces.starts_with_space
            self._names.pop(parts.pieces.unk_id, None)  # decodes to " ⁇ ", so that a reader sees that text was lost
            self._ids = set(range(parts.pieces.size)) | self._names.keys()
        else:
            self.starts_with_space = False
            known = parts.pieces.word_of if isinstance(parts.pieces, Words) else parts.pieces.bytes_of
            self._ids = known.keys() | self._names.keys()
        self.vocab_size = max(self._ids) + 1

    def encode(self, text: str, bos: bool = False, eos: bool = False, max_length: int | None = None) -> list[int]:
        """Ids of a text, all of it plain, with the beginning- and end-of-text ids where asked.

        Of a text that would have more than `max_length` ids, those two among them, the end is left out. Half of a
        surrogate pair, which Python's strings can hold and UTF-8 cannot, becomes U+FFFD.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self.pieces.encode(text)
        if max_length is not None:
            room = max_length - bos - eos
            if room < 0:
                raise ValueError(f"max_length is {max_length}, which leaves no room for the special ids asked for")
            ids = ids[:room]
        if bos:
            ids = [self._role("bos", self.bos_token_id), *ids]
        if eos:
            ids.append(self._role("eos", self.eos_token_id))
        return ids

    def encode_pair(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and of the response as a model would have to write it after exactly those."""
        before, both = self.encode(prompt), self.encode(prompt + response)
        if both[: len(before)] == before:
            return before, both[len(before) :]
        return before, self.encode(response)  # one token would span the boundary

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; special tokens are left out, or shown by name with `skip_special=False`.

        Ids may stop within a character, as they do while text is generated: it shows as U+FFFD.
        """
        ids = [int(id) for id in ids]  # the numbers of an array or tensor too
        for id in ids:
            if id not in self._ids:
                raise ValueError(f"id {id} is no token of this vocabulary; ids go from 0 to {self.vocab_size - 1}")
        if skip_special:
            ids = [id for id in ids if id not in self._names]
        return self.pieces.decode(ids, self._names)

    @property
    def adds_bos(self) -> bool:
        """Was the model trained with the beginning-of-text id before every text? LLaMA is; models of other
        byte-level BPE put theirs where a template says."""
        llama = isinstance(self.pieces, SentencePieces) or "<|begin_of_text|>" in self.special_tokens
        return llama and self.bos_token_id is not None

    def _role(self, role: str, id: int | None) -> int:
        if id is None:
            raise ValueError(f"this tokenizer has no {role} token; encode with {role}=False")
        return id
