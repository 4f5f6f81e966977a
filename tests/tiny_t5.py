"""A T5 small enough for a test, with random weights and no two sizes alike, and its checkpoint with a tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch

import models
from models.t5 import T5
from models.t5_config import T5Config

TOKENIZER = Path(__file__).parent / "data" / "tokenizers" / "t5"
SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "scale_decoder_outputs": False}


def t5(seed: int = 0, **changes: Any) -> T5:
    """A model of v1.0 in evaluation mode; `V1_1` are the changes that make it one of v1.1."""
    torch.manual_seed(seed)
    model = T5(T5Config(**{**SIZES, **changes}))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    torch.nn.init.normal_(model.shared.weight, std=2.0)
    return model.eval()


def checkpoint(directory: Path, **changes: Any) -> Path:
    """Write a model for the shipped part of T5's vocabulary, and that."""
    vocab_size = models.load_tokenizer(TOKENIZER).vocab_size
    models.save(t5(vocab_size=vocab_size, d_model=8, **changes), directory)
    shutil.copy(TOKENIZER / "spiece.model", directory)
    return directory
