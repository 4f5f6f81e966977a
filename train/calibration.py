"""Text to calibrate on: windows of tokens drawn from a file of text, of documents, or of examples to learn from.

A second moment of inputs wants variety more than order, so pieces of the file (documents, examples, or stretches of
a long text) are drawn by a seed, put one behind the other, and cut into windows. Examples read as training would have
them: what a model is fine-tuned on is a good text to round it for.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from eval.data.texts import holds_documents, read_documents, read_text
from models.errors import DataError
from models.tokenizer import Tokenizer
from train.data.config import DataConfig
from train.data.dataset import tokenize_as
from train.data.examples import open_examples

STRETCH = 4096  # characters of a long text that stay together
JOINT = "\n\n"  # between documents
TEXTS = (".txt", ".raw", ".tokens", ".md")


def calibration_windows(
    path: str | Path,
    tokenizer: Tokenizer,
    windows: int = 128,
    tokens: int = 512,
    seed: int = 42,
    template: Literal["plain", "chat"] = "plain",
) -> Int[Tensor, "windows tokens"]:
    """So many windows of so many tokens; fewer if the file has no more. `template` is as in `DataConfig`."""
    path = Path(path)
    if path.suffix.lower() in TEXTS or holds_documents(path):
        texts = read_documents(path) if holds_documents(path) else stretches(read_text(path))
        count, ids_of = len(texts), encoded(texts, tokenizer)
    else:
        config = DataConfig(path=str(path), template=template)
        examples = open_examples(config.path, config.format)
        count, ids_of = (
            len(examples),
            lambda i: (
                tokenize_as(
                    examples[i], task="causal", tokenizer=tokenizer, config=config, layout=examples.format
                ).input_ids
            ),
        )
    ids: list[int] = []
    for number in random.Random(seed).sample(range(count), count):
        ids += ids_of(number)
        if len(ids) >= windows * tokens:
            break
    found = min(len(ids) // tokens, windows)
    if found == 0:
        raise DataError(f"calibrate: {path} has {len(ids)} tokens; one window takes {tokens}")
    return torch.tensor(ids[: found * tokens]).view(found, tokens)


def encoded(texts: Sequence[str], tokenizer: Tokenizer) -> Callable[[int], list[int]]:
    """The ids of a text by its number."""
    return lambda number: tokenizer.encode(texts[number] + JOINT)


def stretches(text: str) -> list[str]:
    """A long text in pieces."""
    return [text[start : start + STRETCH] for start in range(0, len(text), STRETCH)]
