"""A checkpoint small enough to train in a test: random weights, and the first merges of SmolLM2's tokenizer."""

import json
import shutil
from pathlib import Path

import torch

import models
from models.config import LlamaConfig
from models.llama import Llama

TOKENIZER = Path(__file__).parent / "data" / "tokenizers" / "smollm2"


def checkpoint(directory: Path) -> Path:
    """Write the model and its tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, directory)
    # The shipped part of the vocabulary keeps its ids, which are far apart; here every id is a token.
    vocabulary = json.loads((TOKENIZER / "vocab.json").read_text())
    numbered = {token: i for i, token in enumerate(sorted(vocabulary, key=lambda token: vocabulary[token]))}
    (directory / "vocab.json").write_text(json.dumps(numbered))
    tokenizer = models.load_tokenizer(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=(2,),
        pad_token_id=2,
    )
    model = Llama(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.05)
    models.save(model, directory)
    return directory


def records(path: Path, count: int = 24) -> Path:
    """Write as many questions and answers."""
    words = ("red", "blue", "green", "small", "large", "round")
    lines = [
        {"instruction": f"Name colour {i}.", "input": "", "output": f"It is {words[i % 6]} and {words[i // 6 % 6]}."}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
