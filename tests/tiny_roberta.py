"""A RoBERTa small enough to train in a test, whose words are single letters, and labelled texts for it."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import torch

import models
from models.roberta import Roberta
from models.roberta_config import RobertaConfig

DICTIONARY = Path(__file__).parent / "data" / "sapiens_roberta" / "dict.txt"


def checkpoint(directory: Path, labels: tuple[str, ...] = (), positions: int = 34) -> Path:
    """Write a model and its dictionary: with a head that fills masks, or one of these labels (one: a number)."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(DICTIONARY, directory)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=models.load_tokenizer(directory).vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    if labels:
        kind = "regression" if len(labels) == 1 else "single_label_classification"
        config = replace(config, problem_type=kind, labels=labels)
    model = Roberta(config)
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name or "layer_norm" in name:
            torch.nn.init.constant_(parameter, float(name.endswith("weight")))
        else:
            torch.nn.init.normal_(parameter, std=1.0 if "word" in name else 0.2)
    models.save(model, directory)
    return directory


def texts(count: int = 40, seed: int = 0) -> list[tuple[str, bool]]:
    """Texts of letters, and whether W is frequent in them; where it is not, K is."""
    draw = random.Random(seed)
    made: list[tuple[str, bool]] = []
    for number in range(count):
        often = "W" if number % 2 else "K"
        letters = [draw.choice("ACDEFG") if draw.random() > 0.6 else often for _ in range(draw.randint(6, 14))]
        made.append((" ".join(letters), often == "W"))
    return made


def classes(path: Path, names: tuple[str, str] = ("few", "many"), count: int = 40) -> Path:
    """Write texts with the name of their class."""
    lines = [{"text": text, "label": names[many]} for text, many in texts(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def numbers(path: Path, count: int = 40) -> Path:
    """Write texts with a number each."""
    lines = [{"text": text, "score": 1.5 if many else -0.5} for text, many in texts(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
