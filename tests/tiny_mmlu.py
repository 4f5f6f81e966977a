"""MMLU in miniature: files in its layout with questions that need no thought, and a model that always answers alike."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import models
from eval.examinee import Examinee
from eval.mmlu.family import FAMILY
from eval.task import Spec, Suite


def question(subject: str, number: int, answer: str, white: str = "") -> list[str]:
    """A row of a file."""
    return [f"{white}Is it {number} in {subject}?{white}", "one", "two, or so", 'a "third"', "four", answer]


def folder(path: Path, val: Mapping[str, str], dev: str = "ABCDA", white: str = "") -> Path:
    """Write MMLU with these subjects; the answers to a subject's questions are a text such as "BBA"."""
    for split, answers in (("dev", dict.fromkeys(val, dev)), ("val", val), ("test", val)):
        for subject, letters in answers.items():
            file = path / split / f"{subject}_{split}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "w", encoding="utf-8", newline="") as out:
                writer = csv.writer(out, lineterminator="\n")
                writer.writerows(question(subject, n, letter, white) for n, letter in enumerate(letters))
    return path


def examinee(directory: Path, max_tokens: int = 2048, loaded: models.Model | None = None) -> Examinee:
    """Whom to ask: the tokenizer of a tiny checkpoint, and its model if there is one."""
    tokenizer = models.load_tokenizer(directory)
    return Examinee(tokenizer=tokenizer, architecture="llama", max_tokens=max_tokens, loaded=loaded)


def suite(who: Examinee, data: Path, name: str = "mmlu_anatomy", **settings: Any) -> Suite:
    return FAMILY.build(Spec(name=name, examinee=who, data=data, **settings))


def always(model: models.Model, id: int, by: float = 10.0) -> models.Llama:
    """The model, which from now on finds one token `by` nats more probable than any other, whatever it reads."""
    assert isinstance(model, models.Llama)
    scores = torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor([id]), by)
    model.head = lambda hidden: scores.expand(*hidden.shape[:-1], -1)  # pyrefly: ignore[bad-assignment]
    return model
