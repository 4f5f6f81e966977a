"""Which ids begin, end and fill a text, as the small files beside a tokenizer say.

Released checkpoints name these tokens in tokenizer_config.json or special_tokens_map.json. A role that is
named there as null has no token; one that is not named at all is filled by the usual names of the known
families, if the vocabulary has them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.errors import CheckpointError

# Roles and the names that fill them where no file does, the most telling first.
USUAL = {
    "bos": ("<|begin_of_text|>", "<|im_start|>", "<s>", "<|endoftext|>"),
    "eos": ("<|im_end|>", "<|end_of_text|>", "</s>", "<|endoftext|>"),
    "pad": ("<pad>", "<|finetune_right_pad_id|>", "<|im_end|>"),
    "unk": ("<unk>", "<|endoftext|>"),
}


@dataclass(frozen=True)
class SpecialTokens:
    """What the files beside a tokenizer say."""

    names: dict[str, str | None] = field(default_factory=dict)
    """A role's token; None where a file says that there is none."""
    added: dict[str, int] = field(default_factory=dict)
    """Tokens with ids of their own above the vocabulary."""
    add_bos: bool | None = None
    chat_template: str | None = None

    def roles(self, tokens: Mapping[str, int]) -> dict[str, int | None]:
        """Ids by role: as named, else by the usual names that are in `tokens`."""
        found: dict[str, int | None] = {}
        for role, usual in USUAL.items():
            if role in self.names:
                name = self.names[role]
                found[role] = None if name is None else tokens.get(name)
            else:
                found[role] = next((tokens[name] for name in usual if name in tokens), None)
        return found


def read_special_tokens(files: Mapping[str, bytes]) -> SpecialTokens:
    """From the contents of tokenizer_config.json and its like, those that are there."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config |= json_object(name, files.get(name))
    added = {n: i for n, i in json_object("added_tokens.json", files.get("added_tokens.json")).items() if is_id(i)}
    decoder = config.get("added_tokens_decoder")
    for i, token in decoder.items() if isinstance(decoder, dict) else ():
        if str(i).isdigit() and isinstance(token, dict) and isinstance(token.get("content"), str):
            added[token["content"]] = int(i)

    names: dict[str, str | None] = {}
    for role in USUAL:
        for key in (f"{role}_token", *(["cls_token"] if role == "bos" else [])):
            if key in config and role not in names:
                token = config[key]
                token = token.get("content") if isinstance(token, dict) else token
                names[role] = token if isinstance(token, str) else None
    template = config.get("chat_template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode("utf-8", errors="replace")
    add_bos = config.get("add_bos_token")
    return SpecialTokens(
        names,
        added,
        add_bos if isinstance(add_bos, bool) else None,
        template if isinstance(template, str) else None,
    )


def is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def json_object(name: str, content: bytes | None) -> dict[str, Any]:
    """The object in a file's content; nothing if there is no such file."""
    if content is None:
        return {}
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: holds a {type(value).__name__}; a JSON object is needed")
    return value
