"""The texts a benchmark of quality reads: files given as NAME=PATH, or what the model writes itself.

A text that a model has sampled from its own distribution asks for no tokenizer and no file. What another set of
weights loses on it, in nats a token, is an estimate of the Kullback-Leibler divergence between the two, which is 0
for equal weights and above it for all others.
"""

from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import WINDOW, Corpus, corpus
from models import generate, load_tokenizer
from models.errors import ConfigError
from models.llama import Llama
from train.demo_model import sha256_of

OWN_WINDOWS = 32  # of its own text, where no limit says otherwise


def named_files(data: tuple[str, ...]) -> dict[str, Path]:
    """Files by the names they were given."""
    found = {}
    for item in data:
        name, separator, path = item.partition("=")
        if not (name and separator and path):
            raise ConfigError(f"data is given as NAME=PATH, such as wikitext2=valid.txt, not {item!r}")
        if name in found:
            raise ConfigError(f"data names {name} twice; each text needs a name of its own")
        if not Path(path).exists():
            raise ConfigError(f"data: {name}: {path} does not exist")
        found[name] = Path(path)
    return found


def read(data: tuple[str, ...], limit: int | None, model: Llama, path: str | Path) -> list[Corpus]:
    """The first windows of every file, or, if there is none, of the model's own text."""
    window = min(WINDOW, model.config.max_tokens)
    files = named_files(data)
    if not files:
        return [own_text(model, limit or OWN_WINDOWS, window)]
    tokenizer = load_tokenizer(path)
    return [corpus(name, file, tokenizer, limit, window) for name, file in files.items()]


def described(data: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What is needed to know a file again: its name without its folder, its size and its hash."""
    return {
        name: {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for name, file in named_files(data).items()
    }


def own_text(model: Llama, windows: int, window: int, seed: int = 0) -> Corpus:
    """Windows that the model samples at temperature 1, each from its beginning-of-text token."""
    start = model.config.bos_token_id
    if start is None:
        raise ConfigError("the model names no token that a text begins with, so it cannot write one: give data")
    first = torch.full((windows, 1), start, device=model.device)
    ids = generate(model, first, max_new_tokens=window - 1, temperature=1.0, eos_token_id=-1, seed=seed)
    return Corpus("own text", ids.cpu())
