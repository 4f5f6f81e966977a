"""A tokenizer as the metadata of a GGUF file: tokens by id with their kinds, and scores or merges.

A byte-level BPE vocabulary keeps its spelling and its merges, with the name that llama.cpp gives to its way of
cutting text; a SentencePiece one keeps its scores. Rows of the embedding that stand for no token are called
[PAD1000] and so on and marked unused. `models/tokenizer_gguf.py` is the way back.
"""

import json
from dataclasses import dataclass
from typing import Any

from models.bpe import ByteLevelBPE, byte_of
from models.config import LlamaConfig
from models.errors import CheckpointError
from models.spm import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, SentencePieces
from models.tokenizer import Tokenizer
from models.tokenizer_json import merges_file, read_tokenizer_json

PRE_TOKENIZERS = {"gpt2": "gpt-2", "smollm": "smollm", "llama3": "llama-bpe"}
CHARACTER_OF = {byte: character for character, byte in byte_of.items()}
ADDED_SCORE = -1000.0  # no text is ever joined into an added token


@dataclass
class Vocabulary:
    """What stands under `tokenizer.ggml` in a file."""

    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[str] | None


def write_tokenizer(writer: Any, tokenizer: Tokenizer, config: LlamaConfig) -> None:
    """Add the tokenizer to a GGUFWriter, for an embedding of `config.vocab_size` rows."""
    pieces = tokenizer.pieces
    vocabulary = padded(
        merging(tokenizer) if isinstance(pieces, ByteLevelBPE) else scored(tokenizer), config.vocab_size
    )
    writer.add_tokenizer_model("gpt2" if vocabulary.merges is not None else "llama")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[pieces.pattern] if isinstance(pieces, ByteLevelBPE) else "default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if isinstance(pieces, SentencePieces):
        writer.add_add_space_prefix(pieces.starts_with_space)
        writer.add_remove_extra_whitespaces(SPACE * 2 not in "".join(pieces.processor.encode("a  b", out_type=str)))

    stops = stop_ids(tokenizer, config)
    ids = {"bos": tokenizer.bos_token_id, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    ids |= dict(zip(("eos", "eot", "eom"), stops, strict=False))
    adders = {"bos": writer.add_bos_token_id, "unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id}
    adders |= {"eos": writer.add_eos_token_id, "eot": writer.add_eot_token_id, "eom": writer.add_eom_token_id}
    for role, id in ids.items():
        if id is not None:
            adders[role](id)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def stop_ids(tokenizer: Tokenizer, config: LlamaConfig) -> list[int]:
    """The ids that end a text, the tokenizer's own first; a GGUF has room for three."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *config.eos_token_id]))[:3]


def merging(tokenizer: Tokenizer) -> Vocabulary:
    """A byte-level BPE's tokens in GPT-2's alphabet, with its merges in order."""
    vocab, merges = bpe_tables(tokenizer)
    names = {id: token for token, id in (vocab | tokenizer.special_tokens).items()}
    tokens = [names.get(id, unused(id)) for id in range(max(names) + 1)]
    special = set(tokenizer.special_tokens.values())
    kinds = [CONTROL if id in special else NORMAL if id in names else UNUSED for id in range(len(tokens))]
    return Vocabulary(tokens, kinds, None, [f"{left} {right}" for left, right in merges])


def bpe_tables(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges from the files that the tokenizer was read from."""
    files = tokenizer.files
    if "tokenizer.json" in files:
        return read_tokenizer_json(json.loads(files["tokenizer.json"]))[:2]
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if vocabulary in files:
            return json.loads(files[vocabulary]), merges_file(files[merges])
    assert isinstance(tokenizer.pieces, ByteLevelBPE)
    return {spelled(token): id for token, id in tokenizer.pieces.ids.items()}, merges_of(tokenizer.pieces.ranks)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """Merges for a vocabulary that has none but joins whichever neighbours make the token of lowest rank (Llama 3)."""
    merges = []
    for token in sorted(ranks, key=lambda token: ranks[token]):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(left, right) for left, right in splits if left in ranks and right in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled(left), spelled(right)) for left, right in known]
    return merges


def spelled(token: bytes) -> str:
    return "".join(CHARACTER_OF[byte] for byte in token)


def scored(tokenizer: Tokenizer) -> Vocabulary:
    """A SentencePiece vocabulary, with the tokens that were added to it behind."""
    assert isinstance(tokenizer.pieces, SentencePieces)
    processor, size = tokenizer.pieces.processor, tokenizer.pieces.size
    added = {id: token for token, id in tokenizer.special_tokens.items() if id >= size}
    tokens = [processor.id_to_piece(id) for id in range(size)]
    kinds = [piece_kind(processor, id) for id in range(size)]
    scores = [float(processor.get_score(id)) for id in range(size)]
    for id in range(size, max(added, default=size - 1) + 1):
        tokens.append(added.get(id, unused(id)))
        kinds.append(CONTROL if id in added else UNUSED)
        scores.append(ADDED_SCORE)
    return Vocabulary(tokens, kinds, scores, None)


def piece_kind(processor: Any, id: int) -> int:
    """The kind of a piece; one that is user-defined cannot be told from a normal one, and joins as it does."""
    if processor.is_unknown(id):
        return UNKNOWN
    if processor.is_control(id):
        return CONTROL
    if processor.is_byte(id):
        return BYTE
    return UNUSED if processor.is_unused(id) else NORMAL


def padded(vocabulary: Vocabulary, rows: int) -> Vocabulary:
    """As many tokens as the embedding has rows."""
    count = len(vocabulary.tokens)
    if count > rows:
        raise CheckpointError(
            f"export: the tokenizer has ids up to {count - 1}, but the embedding has {rows} rows; "
            "they are not of the same model"
        )
    vocabulary.tokens += [unused(id) for id in range(count, rows)]
    vocabulary.kinds += [UNUSED] * (rows - count)
    if vocabulary.scores is not None:
        vocabulary.scores += [ADDED_SCORE] * (rows - count)
    return vocabulary


def unused(id: int) -> str:
    return f"[PAD{id}]"
