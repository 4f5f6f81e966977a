"""Text to ids and back, from whatever files a checkpoint brings.

Two families: sentencepiece models (LLaMA 1 and 2, T5) and byte-level BPE (GPT-2, RoBERTa, Llama 3, SmolLM2).
A special token that stands in a text is plain text here; its id is only ever put in by code that means it,
such as a chat template. A tokenizer keeps the content of the files that it came from, and so can be saved;
one from a GGUF is first brought into such files.
"""

import base64
import binascii
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from models.bpe import ByteLevelBPE, guess_pattern, merge_ranks, token_ids, unmerged
from models.errors import CheckpointError
from models.special_tokens import SpecialTokens, is_id, json_object, read_special_tokens
from models.spm import SentencePieces
from models.tokenizer_gguf import gguf_tokenizer_files
from models.tokenizer_json import read_tokenizer_json, split_merges

Files = dict[str, bytes]


@runtime_checkable
class Vocabulary(Protocol):
    """What a family provides: ids of plain text, and the text of ids with some of them given by name."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int], names: dict[int, str]) -> str: ...


class Tokenizer:
    """A vocabulary with its special tokens."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        size: int,
        special_tokens: dict[str, int],
        roles: dict[str, int | None],
        *,
        adds_bos: bool,
        chat_template: str | None,
        files: Files,
    ) -> None:
        self.vocabulary = vocabulary
        self.vocab_size = max(size - 1, *special_tokens.values(), -1) + 1 if special_tokens else size
        self.special_tokens = dict(sorted(special_tokens.items(), key=lambda item: item[1]))
        self.names = {i: name for name, i in self.special_tokens.items()}
        self.bos_token_id, self.eos_token_id = roles["bos"], roles["eos"]
        self.pad_token_id, self.unk_token_id = roles["pad"], roles["unk"]
        self.adds_bos = adds_bos and roles["bos"] is not None
        self.chat_template = chat_template
        self.files = files

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text, with the beginning- and end-of-text ids if asked for."""
        # A lone surrogate is no character; it becomes U+FFFD, as in any UTF-8 writer.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self.vocabulary.encode(text)
        if bos:
            ids = [needed(self.bos_token_id, "beginning-of-text"), *ids]
        if eos:
            ids = [*ids, needed(self.eos_token_id, "end-of-text")]
        return ids

    def encode_pair(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and of the response as a model would have to write it after exactly those."""
        before, both = self.encode(prompt), self.encode(prompt + response)
        if both[: len(before)] == before:
            return before, both[len(before) :]
        return before, self.encode(response)  # one token would span the boundary

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids. Special tokens are left out, or shown by name; half a character is U+FFFD."""
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(f"id {outside[0]} is outside this vocabulary of {self.vocab_size}")
        if skip_special:
            return self.vocabulary.decode([i for i in ids if i not in self.names], {})
        return self.vocabulary.decode(ids, self.names)


def needed(value: int | None, what: str) -> int:
    if value is None:
        raise ValueError(f"this tokenizer has no {what} id")
    return value


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint's directory, or of one of the files in it."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    files = tokenizer_files(path)
    for names, make in LAYOUTS:
        if set(names) <= files.keys():
            used = {name: files[name] for name in (*names, *COMPANIONS) if name in files}
            try:
                return make(used, read_special_tokens(files))
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path}: {names[0]} cannot be used: {error}") from None
    looked_for = ", ".join("+".join(names) for names, _ in LAYOUTS)
    raise CheckpointError(f"{path}: no tokenizer; looked for {looked_for} and one *.gguf")


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write files that `load_tokenizer` reads back as an equal tokenizer."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files.items():
        (directory / name).write_bytes(content)


COMPANIONS = (
    "dict.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def tokenizer_files(path: Path) -> Files:
    """The contents of the files that may matter, by name. A file that was named itself stands alone."""
    if path.suffix == ".gguf":
        return gguf_tokenizer_files(path)
    directory = path if path.is_dir() else path.parent
    wanted = {name for names, _ in LAYOUTS for name in names} | set(COMPANIONS)
    if path.is_file() and path.name in wanted:
        layout = next((names for names, _ in LAYOUTS if path.name in names), ())
        wanted = {*layout, *COMPANIONS}
    found = {p.name: p.read_bytes() for p in directory.iterdir() if p.name in wanted and p.is_file()}
    ggufs = sorted(directory.glob("*.gguf"))
    if len(ggufs) == 1 and not any(set(names) <= found.keys() for names, _ in LAYOUTS):
        return gguf_tokenizer_files(ggufs[0])
    return found


# Layouts


def from_sentencepiece(name: str) -> Callable[[Files, SpecialTokens], Tokenizer]:
    def make(files: Files, special: SpecialTokens) -> Tokenizer:
        if is_rank_list(files[name]):
            return from_rank_list(files, files[name], special)
        pieces = SentencePieces(files[name])
        # The unknown piece is no mark but a hole in the text, and decoding shows it.
        tokens = {n: i for n, i in pieces.special.items() if i != pieces.unk_id}
        tokens |= {n: i for n, i in special.added.items() if i >= pieces.size}
        if name == "spiece.model" and not any(n.startswith("<extra_id_") for n in tokens):
            # T5's sentinels lie above the pieces, the first of them highest.
            tokens |= {f"<extra_id_{n}>": pieces.size + SENTINELS - 1 - n for n in range(SENTINELS)}
        # The model's own roles stand; files fill only what it leaves open.
        named = special.roles(tokens)
        roles = {role: i if (i := pieces.roles[role]) >= 0 else named[role] for role in pieces.roles}
        if pieces.roles["bos"] < 0:
            roles["bos"] = None
        add_bos = special.add_bos is not False
        return Tokenizer(
            pieces,
            pieces.size,
            tokens,
            roles,
            adds_bos=add_bos,
            chat_template=special.chat_template,
            files=files,
        )

    return make


def from_tokenizer_json(files: Files, special: SpecialTokens) -> Tokenizer:
    content = json_object("tokenizer.json", files["tokenizer.json"])
    vocab, merges, pattern, added = read_tokenizer_json(content)
    bos = any(first in str(content.get("post_processor")) for first in ("<|begin_of_text|>", "RobertaProcessing"))
    return from_bpe(files, special, vocab, merges, pattern, added, adds_bos=bos)


def from_vocab_and_merges(vocab_name: str, merges_name: str) -> Callable[[Files, SpecialTokens], Tokenizer]:
    def make(files: Files, special: SpecialTokens) -> Tokenizer:
        vocab = json_object(vocab_name, files[vocab_name])
        lines = files[merges_name].decode("utf-8").split("\n")
        start = 1 if lines[0].startswith("#version") else 0
        merges = split_merges([line for line in lines[start:] if line.strip()])
        added = {name: vocab[name] for name in unmerged(vocab, merges)}
        if "dict.txt" in files:
            vocab, added = fairseq_vocabulary(vocab, files["dict.txt"])
        return from_bpe(files, special, vocab, merges, guess_pattern(vocab, merges), added)

    return make


def from_bpe(
    files: Files,
    special: SpecialTokens,
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    pattern: str,
    added: dict[str, int],
    adds_bos: bool = False,
) -> Tokenizer:
    wrong = [name for name, i in (vocab | added).items() if not is_id(i)]
    if wrong:
        raise ValueError(f"the id of {wrong[0]!r} is not a whole number")
    tokens = {**added, **special.added}
    plain = {token: i for token, i in vocab.items() if token not in tokens}
    ids = token_ids(plain)
    if pattern == "llama3":  # here a word that is a token is taken whole, so ids are the order
        ranks = {token: i for i, token in enumerate(sorted(ids, key=lambda token: ids[token]))}
    else:
        ranks = merge_ranks(plain, merges)
    roles = special.roles(vocab | tokens)
    tokens |= {name: i for name, i in vocab.items() if i in roles.values() and i not in ids.values()}
    return Tokenizer(
        ByteLevelBPE(ranks, ids, pattern),
        max([*vocab.values(), *tokens.values()], default=-1) + 1,
        tokens,
        roles,
        adds_bos=adds_bos if special.add_bos is None else special.add_bos,
        chat_template=special.chat_template,
        files=files,
    )


def fairseq_vocabulary(vocab: dict[str, int], listing: bytes) -> tuple[dict[str, int], dict[str, int]]:
    """RoBERTa's ids: dict.txt lists GPT-2's ids by frequency, behind four special tokens and before <mask>."""
    name_of = {str(i): token for token, i in vocab.items()}
    symbols = [line.rpartition(" ")[0] for line in listing.decode("utf-8").split("\n") if line.strip()]
    renumbered = {name_of[s]: row + 4 for row, s in enumerate(symbols) if s in name_of}
    if not renumbered:
        raise ValueError("dict.txt lists none of the vocabulary's ids; it belongs to another tokenizer")
    added = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": len(symbols) + 4}
    added |= {s: row + 4 for row, s in enumerate(symbols) if s not in name_of}
    lost = {token: renumbered[token] for token in renumbered if token == "<|endoftext|>"}
    return {t: i for t, i in renumbered.items() if t not in lost}, added | lost


SENTINELS = 100
LLAMA3_RESERVED = 256
LLAMA3_NAMES = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def is_rank_list(content: bytes) -> bool:
    """Since Llama 3, `tokenizer.model` may be lines of a token in base64 and its rank."""
    first = content.partition(b"\n")[0].split(b" ")
    return len(first) == 2 and first[1].strip().isdigit()


def from_rank_list(files: Files, content: bytes, special: SpecialTokens) -> Tokenizer:
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        token, _, rank = line.partition(b" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (binascii.Error, ValueError):
            raise ValueError(f"line {number} is not a token in base64 and its rank") from None
    first = max(ranks.values()) + 1
    tokens = {LLAMA3_NAMES.get(n, f"<|reserved_special_token_{n}|>"): first + n for n in range(LLAMA3_RESERVED)}
    return Tokenizer(
        ByteLevelBPE(ranks, dict(ranks), "llama3"),
        first,
        tokens,
        special.roles(tokens),
        adds_bos=True,
        chat_template=special.chat_template,
        files=files,
    )


LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[Files, SpecialTokens], Tokenizer]], ...] = (
    (("tokenizer.model",), from_sentencepiece("tokenizer.model")),
    (("spiece.model",), from_sentencepiece("spiece.model")),
    (("tokenizer.json",), from_tokenizer_json),
    (("vocab.json", "merges.txt"), from_vocab_and_merges("vocab.json", "merges.txt")),
    (("encoder.json", "vocab.bpe"), from_vocab_and_merges("encoder.json", "vocab.bpe")),
)
