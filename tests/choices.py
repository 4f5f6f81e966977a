"""What the tests of multiple choice share: a small model, files, and a likelihood computed another way."""

import json
from pathlib import Path
from typing import Any

import torch

import models
from eval.answering import answer_all
from eval.examinee import Examinee
from eval.task import Spec
from tests.tiny import checkpoint


def small(directory: Path) -> Examinee:
    """The tiny model, ready to be asked."""
    path = checkpoint(directory)
    model = models.load(path, dtype=torch.float32)
    return Examinee(
        tokenizer=models.load_tokenizer(path),
        architecture="llama",
        max_tokens=256,
        loaded=model,
        identity="tiny",
    )


def lines(path: Path, *records: Any) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def spec(name: str, examinee: Any, data: Path | None, **more: Any) -> Spec:
    return Spec(name=name, examinee=examinee, data=data, **more)


def asked(examinee: Examinee, task: Any) -> list[list[Any]]:
    """The answers about every document."""
    return [answer_all(examinee, task.requests(document, examinee)) for document in task.documents]


def plain(examinee: Examinee, context: str, continuation: str) -> float:
    """Log-probability of a continuation that begins with a space, token by token, one row at a time."""
    ids, after = examinee.tokenizer.encode(context), examinee.tokenizer.encode(continuation)
    total = 0.0
    for token in after:
        total += examinee.model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)[token].item()
        ids = [*ids, token]
    return total
