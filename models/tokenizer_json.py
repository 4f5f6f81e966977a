"""`tokenizer.json`, the single-file format of byte-level BPE tokenizers, read and written.

It holds a vocabulary, merges, added (special) tokens, and a tree of steps that cut the text. Only the three
trees that stand for the patterns of `models/bpe.py` are known; with another the ids would be wrong, so it is
refused.
"""

import json
from typing import Any

from models.bpe import PATTERNS

ID_LIMIT = 2**31
DIGITS = {"type": "Digits", "individual_digits": True}


def read_tokenizer_json(
    content: dict[str, Any],
) -> tuple[dict[str, int], list[tuple[str, str]], str, dict[str, int]]:
    """Vocabulary, merges, the pattern's name and the added tokens; ValueError says what is not understood."""
    model = content.get("model")
    if not isinstance(model, dict):
        raise ValueError('it has no "model"')
    kind = model.get("type", "BPE" if "merges" in model else None)  # the first releases left the type out
    if kind != "BPE" or model.get("byte_fallback"):
        found = f'"{kind}"' + (" with byte fallback" if model.get("byte_fallback") else "")
        raise ValueError(
            f"its model is {found}, and only byte-level BPE is read from this format; put the SentencePiece"
            " file of the same checkpoint (tokenizer.model or spiece.model) beside it"
        )
    if content.get("normalizer") is not None:
        raise ValueError(f"its normalizer is {_short(content['normalizer'])}; only files without one can be read")
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            raise ValueError(f'its model sets "{option}" to {_short(model[option])}, which is not supported')

    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise ValueError('its model lacks "vocab" or "merges"')
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(t, dict) and "id" in t and isinstance(t.get("content"), str) for t in added
    ):
        raise ValueError('"added_tokens" is not a list of records with "id" and "content"')
    special = {token["content"]: token["id"] for token in added}
    check_ids(vocab, special)
    return vocab, split_merges(merges), _pattern(content.get("pre_tokenizer")), special


def merges_file(content: bytes) -> list[tuple[str, str]]:
    """The pairs of a merges.txt or vocab.bpe, whose first line may tell its version."""
    lines = content.decode().replace("\r\n", "\n").split("\n")
    return split_merges([line for line in lines if line and not line.startswith("#version")])


def split_merges(merges: list[Any]) -> list[tuple[str, str]]:
    """Merges as pairs; files hold them as "left right" or as [left, right]."""
    pairs = []
    for line, merge in enumerate(merges, 1):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) and p for p in parts):
            raise ValueError(f"merge {line} is {_short(merge)}; two tokens with one space between are expected")
        pairs.append((parts[0], parts[1]))
    return pairs


def check_ids(vocab: dict[str, Any], special: dict[str, Any]) -> None:
    """Ids are distinct whole numbers, and a special token has its own."""
    for token, id in (*vocab.items(), *special.items()):
        if type(id) is not int or not 0 <= id < ID_LIMIT:
            raise ValueError(f'token "{token}" has the id {id!r}; a whole number from 0 is expected')
    token_of = {id: token for token, id in vocab.items()}
    if len(token_of) < len(vocab):
        raise ValueError(f"{len(vocab) - len(token_of)} of its {len(vocab)} tokens share an id with another")
    for token, id in special.items():
        if token_of.get(id, token) != token or vocab.get(token, id) != id:
            raise ValueError(f'added token "{token}" has the id {id}, but the vocabulary says otherwise')


def write_tokenizer_json(
    vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str, added: dict[str, int]
) -> bytes:
    """The same file for a tokenizer that came from elsewhere."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": text, **flags} for text, id in added.items()],
        "normalizer": None,
        "pre_tokenizer": _steps(pattern),
        "post_processor": None,
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pattern == "llama3",
            "vocab": vocab,
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


def _pattern(node: Any) -> str:
    steps = node.get("pretokenizers") if isinstance(node, dict) and node.get("type") == "Sequence" else [node]
    if isinstance(steps, list):
        for pattern in PATTERNS:
            known = _steps(pattern)
            if _essence(steps) == _essence(known.get("pretokenizers", [known])):
                return pattern
    raise ValueError(
        f"its pre_tokenizer is {_short(node)}; known are GPT-2's (ByteLevel), SmolLM2's (Digits, ByteLevel)"
        " and Llama 3's (Split, ByteLevel)"
    )


def _steps(pattern: str) -> dict[str, Any]:
    if pattern == "gpt2":
        return _byte_level()
    if pattern == "smollm":
        return {"type": "Sequence", "pretokenizers": [DIGITS, _byte_level()]}
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERNS[pattern]},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


def _byte_level(use_regex: bool = True) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _essence(steps: list[Any]) -> list[Any]:
    """Steps without what changes no id (trim_offsets) and with what files may leave to the default."""
    defaults = {"ByteLevel": {"add_prefix_space": True, "use_regex": True}, "Split": {"invert": False}}
    kept = []
    for step in steps:
        step = step if isinstance(step, dict) else {"type": step}
        full = defaults.get(str(step.get("type")), {}) | step
        kept.append({key: value for key, value in full.items() if key != "trim_offsets"})
    return kept


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 160 else text[:157] + "..."
