"""One example as a RoBERTa learns it: a text or a pair of them as evaluation reads it, and a label."""

from eval.labelling import marked
from models.errors import DataError
from models.tokenizer import Tokenizer
from train.data.config import DataConfig
from train.data.formats import Example
from train.data.tokenized import IGNORED, Tokenized


def tokenize(example: Example, tokenizer: Tokenizer, config: DataConfig, layout: str = "") -> Tokenized:
    """Ids of the texts with their marks, cut to `max_len`, and the label: the number of a class, or a number."""
    if not 1 <= len(example.texts) <= 2 or example.label is None:
        raise DataError(f"data: {example.where} has {len(example.texts)} texts and the label {example.label}")
    if example.label == IGNORED:
        raise DataError(f"data: {example.where} has the label {IGNORED}, which stands for none; shift all numbers")
    ids, missing = marked(example.texts, tokenizer, config.max_len)
    return Tokenized(ids, [], example.where, example.opening, cut_prompt=missing > 0, label=example.label)
