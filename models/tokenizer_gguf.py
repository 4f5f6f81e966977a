"""The tokenizer in a GGUF file's metadata, as the files that other checkpoints have in its place.

A byte-level BPE vocabulary becomes `tokenizer.json`, a SentencePiece one `tokenizer.model`, and
`tokenizer_config.json` names the special tokens and holds the chat template. So there is one way of
loading, and a tokenizer from a GGUF file can be saved.
"""

import json
from pathlib import Path
from typing import Any

from models.bpe import guess_pattern
from models.errors import CheckpointError
from models.gguf_header import read_gguf_header
from models.spm import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, build_model
from models.tokenizer_json import split_merges, write_tokenizer_json

# names that llama.cpp gives to the ways of cutting text, where they are one of ours
PATTERN_OF = {
    "gpt-2": "gpt2",
    "roberta-bpe": "gpt2",
    "smollm": "smollm",
    "starcoder": "smollm",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
}
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def gguf_tokenizer_files(path: Path) -> dict[str, bytes]:
    """File names and contents that make the same tokenizer."""
    metadata = read_gguf_header(path).metadata
    try:
        return _files(metadata)
    except ValueError as error:
        raise CheckpointError(f"{path}: its tokenizer cannot be used: {error}") from None


def _files(metadata: dict[str, Any]) -> dict[str, bytes]:
    tokens = _list(metadata, "tokens", str)
    kinds = _list(metadata, "token_type", int) if "tokenizer.ggml.token_type" in metadata else [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens have {len(kinds)} types")
    repeated = len(tokens) - len(set(tokens))
    if repeated:
        raise ValueError(f"{repeated} of its tokens are repeated")

    # Where a model's embedding has more rows than there are tokens, the last ones are called [PAD1000] and so on.
    while tokens and kinds[-1] == UNUSED and tokens[-1].startswith("[PAD"):
        tokens, kinds = tokens[:-1], kinds[:-1]

    # A role without a token is named as null, so that nothing is guessed when the files are read back.
    roles = {role: metadata.get(f"tokenizer.ggml.{key}_token_id", -1) for role, key in ROLES.items()}
    roles = {role: id if isinstance(id, int) and 0 <= id < len(tokens) else -1 for role, id in roles.items()}
    config: dict[str, Any] = {f"{role}_token": tokens[id] if id >= 0 else None for role, id in roles.items()}
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    files = {"tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1).encode()}

    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        merges = split_merges(_list(metadata, "merges", str))
        name = metadata.get("tokenizer.ggml.pre", "default")
        if name != "default" and name not in PATTERN_OF:
            known = ", ".join(PATTERN_OF)
            raise ValueError(f'it cuts text by the rules "{name}"; known are {known}')
        vocab = {token: id for id, token in enumerate(tokens) if kinds[id] != UNUSED}
        special = {token: id for token, id in vocab.items() if kinds[id] in (UNKNOWN, CONTROL, USER_DEFINED)}
        pattern = PATTERN_OF[name] if name in PATTERN_OF else guess_pattern(vocab, merges)
        return files | {"tokenizer.json": write_tokenizer_json(vocab, merges, pattern, special)}
    if kind == "llama":
        scores = _list(metadata, "scores", float)[: len(tokens)]
        if len(scores) < len(tokens):
            raise ValueError(f"{len(tokens)} tokens have {len(scores)} scores")
        model = build_model(
            tokens,
            scores,
            [_sentencepiece_kind(token, kind) for token, kind in zip(tokens, kinds, strict=True)],
            roles,
            add_dummy_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
            remove_extra_whitespaces=bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)),
        )
        return files | {"tokenizer.model": model}
    raise ValueError(f'it is of the kind "{kind}"; known are "gpt2" and "llama"')


def _sentencepiece_kind(token: str, kind: int) -> int:
    """Added tokens such as <|im_end|> are user-defined in GGUF; as control pieces no text can spell them."""
    marked = token[:1] + token[-1:] in ("<>", "[]")
    return CONTROL if kind == USER_DEFINED and marked else kind


def _list(metadata: dict[str, Any], key: str, item: type) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(isinstance(value, item) for value in values):
        raise ValueError(f'"tokenizer.ggml.{key}" is missing or not a list of {item.__name__}')
    return values
