"""Which files make a tokenizer, and what the settings beside a vocabulary say about its special tokens.

Released checkpoints name their special tokens in up to five places. The order of trust is here:
`tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`, `config.json`, then what
is known of the family whose tokens the vocabulary has.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.bpe import ByteLevelBPE, guess_pattern, merge_ranks, token_ids, unmerged
from models.errors import CheckpointError, NoTokenizerError
from models.spm import SentencePieces
from models.tokenizer_gguf import gguf_tokenizer_files
from models.tokenizer_json import check_ids, merges_file, read_tokenizer_json
from models.words import Words, dictionary_specials

VOCABULARIES = (
    ("tokenizer.model",),
    ("spiece.model",),
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
    ("dict.txt",),
)
FAIRSEQ_DICTIONARY = "dict.txt"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
MODEL_SETTINGS = ("generation_config.json", "config.json")  # read, but never written: they are the model's

# Roles by the special tokens of a family. The first family with its first token in the vocabulary is taken.
FAMILIES = (
    {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>", "unk": "<|endoftext|>"},  # SmolLM2
    {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},  # Llama 3
    {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"},  # RoBERTa
    {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"},  # GPT-2
)

T5_SENTINELS = 100  # <extra_id_0> to <extra_id_99>, not in its SentencePiece file


@dataclass
class TokenizerParts:
    """What a tokenizer is made of."""

    pieces: ByteLevelBPE | SentencePieces | Words
    special: dict[str, int]
    roles: dict[str, int | None]
    chat_template: str | None
    files: dict[str, bytes]


def read_tokenizer_files(path: Path) -> tuple[dict[str, bytes], Path]:
    """Contents by name of the files that `tokenizer_parts` takes, and the path to name in errors."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint directory, a tokenizer file or a .gguf file")
    if path.is_file() and path.suffix == ".gguf":
        return gguf_tokenizer_files(path), path

    directory = path if path.is_dir() else path.parent
    ggufs = sorted(directory.glob("*.gguf"))
    if path.is_dir() and len(ggufs) == 1 and not vocabulary_in(file.name for file in directory.iterdir()):
        return gguf_tokenizer_files(ggufs[0]), ggufs[0]
    names = {file.name for file in directory.iterdir() if file.is_file()}
    groups = [group for group in VOCABULARIES if path.name in group and path.is_file()]
    if path.is_file() and path.name == FAIRSEQ_DICTIONARY:
        groups = list(VOCABULARIES[-2:])
    if path.is_file() and path.suffix == ".model" and not groups:  # a SentencePiece file of another name
        vocabulary, where = {"tokenizer.model": path}, path
    else:
        chosen = vocabulary_in(names, groups or VOCABULARIES)
        if not chosen:
            wanted = ", ".join(" + ".join(group) for group in groups or VOCABULARIES)
            raise NoTokenizerError(f"{directory} holds no tokenizer; looked for {wanted} (or name a .gguf file)")
        vocabulary = {name: directory / name for name in (*chosen, FAIRSEQ_DICTIONARY) if name in names}
        where = directory

    settings = {name: directory / name for name in (*SETTINGS, *MODEL_SETTINGS) if name in names}
    return {name: _read(file) for name, file in (vocabulary | settings).items()}, where


def vocabulary_in(names: Iterable[str], groups: Iterable[tuple[str, ...]] = VOCABULARIES) -> tuple[str, ...]:
    """The group of vocabulary files among these names that is read, or nothing."""
    names = set(names)
    return next((group for group in groups if names.issuperset(group)), ())


def tokenizer_parts(files: dict[str, bytes], where: Path) -> TokenizerParts:
    """A vocabulary, its special tokens and their roles; a file that is broken is refused by name."""
    settings = {name: _json(files, name, where) for name in (*SETTINGS, *MODEL_SETTINGS) if name.endswith(".json")}
    group = vocabulary_in(files)
    pieces: ByteLevelBPE | SentencePieces | Words
    if group[0].endswith(".model"):
        with _refusing(where, group[0]):
            if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", files[group[0]]):
                pieces, special = _llama3(files[group[0]])
            else:
                pieces = SentencePieces(files[group[0]])
                special = pieces.special | _t5_sentinels(pieces, settings["tokenizer_config.json"])
    elif group == ("tokenizer.json",):
        content = _json(files, "tokenizer.json", where)
        with _refusing(where, "tokenizer.json"):
            vocab, merges, pattern, special = read_tokenizer_json(content)
            pieces = ByteLevelBPE(merge_ranks(vocab, merges), token_ids(vocab), pattern)
    elif group == (FAIRSEQ_DICTIONARY,):
        with _refusing(where, FAIRSEQ_DICTIONARY):
            pieces = Words(_fairseq_symbols(files[FAIRSEQ_DICTIONARY].decode()))
            special = pieces.special
    else:
        pieces, special = _vocabulary_and_merges(files, group, where)

    with _refusing(where, group[0]):
        if isinstance(pieces, ByteLevelBPE | Words) and not pieces.ids:
            raise ValueError("its vocabulary is empty")
    with _refusing(where, "tokenizer_config.json or added_tokens.json"):
        special = special | _added_tokens(settings)
    special = dict(sorted(special.items(), key=lambda item: item[1]))

    families = (f for f in FAMILIES if f["bos"] in special)
    defaults = {role: special.get(name) for role, name in next(families, {}).items()}
    if isinstance(pieces, SentencePieces):
        defaults = {role: id for role, id in pieces.roles.items() if id >= 0}
    roles = _roles(settings, special, defaults)

    template = files.get("chat_template.jinja", b"").decode("utf-8", "replace") or None
    return TokenizerParts(
        pieces=pieces,
        special=special,
        roles=roles,
        chat_template=template or _chat_template(settings["tokenizer_config.json"]),
        files=_files_to_save(files, settings, special, roles, defaults),
    )


def _vocabulary_and_merges(
    files: dict[str, bytes], group: tuple[str, ...], where: Path
) -> tuple[ByteLevelBPE, dict[str, int]]:
    """GPT-2's two files; with fairseq's dictionary, which renumbers them, RoBERTa's ids."""
    vocab = _json(files, group[0], where)
    with _refusing(where, group[0]):
        check_ids(vocab, {})
    with _refusing(where, group[1]):
        merges = merges_file(files[group[1]])
        ranks = merge_ranks(vocab, merges)

    special = {token: vocab[token] for token in unmerged(vocab, merges)}
    pattern = guess_pattern(vocab, merges)
    if FAIRSEQ_DICTIONARY not in files or "<s>" in vocab:  # a table with <s> has RoBERTa's ids already
        return ByteLevelBPE(ranks, token_ids(vocab), pattern), special

    with _refusing(where, FAIRSEQ_DICTIONARY):
        symbols = _fairseq_symbols(files[FAIRSEQ_DICTIONARY].decode())
    roberta = dictionary_specials(len(symbols))
    line_of = {symbol: line for line, symbol in enumerate(symbols)}
    ids = {token: line_of[str(id)] + 4 for token, id in token_ids(vocab).items() if str(id) in line_of}
    fillers = {symbol.encode(): line + 4 for symbol, line in line_of.items() if not symbol.isdigit()}
    special = roberta | {token: line_of[str(id)] + 4 for token, id in special.items() if str(id) in line_of}
    return ByteLevelBPE(ranks, fillers | ids, pattern, missing=roberta["<unk>"]), special


def _fairseq_symbols(text: str) -> list[str]:
    """First column of fairseq's dictionary: words, or for RoBERTa GPT-2's ids, by how often they occurred."""
    symbols = []
    for number, line in enumerate(text.splitlines(), 1):
        columns = line.split(" ")
        if len(columns) not in (2, 3) or not columns[0] or not columns[1].isdigit():
            raise ValueError(f'line {number} is "{line[:80]}"; a symbol and its count are expected')
        symbols.append(columns[0])
    if len(set(symbols)) < len(symbols):
        raise ValueError(f"{len(symbols) - len(set(symbols))} symbols are repeated, so ids by line would be ambiguous")
    return symbols


def _llama3(data: bytes) -> tuple[ByteLevelBPE, dict[str, int]]:
    """Llama 3's file: a base64 token and its rank, which is its id, a line; 256 special tokens follow."""
    ids: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ids[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"line {number} is not a base64 token and its rank") from None
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError("ranks are not 0, 1, 2 and so on, each once; the file is truncated or damaged")
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    reserved = iter(range(256))
    names = [named.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(256)]
    special = {f"<|{name}|>": len(ids) + i for i, name in enumerate(names)}
    return ByteLevelBPE(ids, dict(ids), "llama3"), special


def _t5_sentinels(pieces: SentencePieces, config: dict[str, Any]) -> dict[str, int]:
    """T5's 100 sentinels lie above its vocabulary, the first one highest; its roles tell a T5 from others."""
    is_t5 = pieces.roles == {"bos": -1, "eos": 1, "pad": 0, "unk": 2}
    count = config.get("extra_ids", T5_SENTINELS if is_t5 else 0)
    if not isinstance(count, int) or not 0 <= count <= 10_000:
        raise ValueError(f'"extra_ids" in tokenizer_config.json is {count}; a count of tokens is expected')
    if pieces.processor.piece_to_id("<extra_id_0>") != pieces.unk_id:  # it has sentinels of its own
        return {}
    return {f"<extra_id_{i}>": pieces.size + count - 1 - i for i in range(count)}


def _added_tokens(settings: Mapping[str, dict[str, Any]]) -> dict[str, int]:
    """Tokens added to a vocabulary after its training, from the two places where releases keep them."""
    added = dict(settings["added_tokens.json"])
    table = settings["tokenizer_config.json"].get("added_tokens_decoder") or {}
    if not isinstance(table, dict):
        raise ValueError('"added_tokens_decoder" is not a table of ids')
    for id, token in table.items():
        name = _token_name(token)
        if name is None or not id.isdigit():
            raise ValueError(f'"added_tokens_decoder" has "{id}": {str(token)[:80]}; an id and a token are expected')
        added[name] = int(id)
    check_ids({}, added)
    return added


def _roles(
    settings: Mapping[str, dict[str, Any]], special: dict[str, int], defaults: Mapping[str, int | None]
) -> dict[str, int | None]:
    """Ids of the beginning, end, padding and unknown tokens."""
    roles: dict[str, int | None] = {}
    ids = set(special.values())
    for role in ("bos", "eos", "pad", "unk"):
        named = [
            settings[file][f"{role}_token"]
            for file in ("tokenizer_config.json", "special_tokens_map.json")
            if f"{role}_token" in settings[file]
        ]
        numbered = [settings[file].get(f"{role}_token_id") for file in MODEL_SETTINGS]
        numbered = [id[0] if isinstance(id, list) and id else id for id in numbered]  # several ids may end a text
        candidates = [special[name] for name in map(_token_name, named) if name in special]
        candidates += [id for id in numbered if isinstance(id, int) and id in ids]
        if named and named[0] is None:
            roles[role] = None  # said to be absent
        else:
            roles[role] = candidates[0] if candidates else defaults.get(role)
    return roles


def _files_to_save(
    files: dict[str, bytes],
    settings: Mapping[str, dict[str, Any]],
    special: dict[str, int],
    roles: dict[str, int | None],
    defaults: Mapping[str, int | None],
) -> dict[str, bytes]:
    """The files as they are, with roles that only the model's settings gave written among the tokenizer's."""
    alone = {name: {} if name in MODEL_SETTINGS else content for name, content in settings.items()}
    kept = {name: content for name, content in files.items() if name not in MODEL_SETTINGS}
    if _roles(alone, special, defaults) == roles:
        return kept
    name_of = {id: name for name, id in special.items()}
    named = {f"{role}_token": None if id is None else name_of[id] for role, id in roles.items()}
    config = settings["tokenizer_config.json"] | named
    return kept | {"tokenizer_config.json": json.dumps(config, indent=1).encode()}


def _chat_template(config: dict[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None


def _token_name(token: Any) -> str | None:
    """A token is written as its text or as a record with its text."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _json(files: dict[str, bytes], name: str, where: Path) -> dict[str, Any]:
    """A file's table, empty where there is no such file."""
    with _refusing(where, name):
        content = json.loads(files.get(name, b"{}").decode("utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} where a table is expected")
        return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


@contextmanager
def _refusing(where: Path, name: str) -> Iterator[None]:
    """Whatever a file's content breaks becomes one message that names the file."""
    label = where / name if where.is_dir() else f"{where} ({name})"
    try:
        yield
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{label}: broken JSON, perhaps a truncated download: {error}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{label}: not UTF-8 text: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{label}: {error}") from None
