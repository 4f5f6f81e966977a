"""Examinees for tests, and a task put to one: what it scores, by the definitions alone."""

from pathlib import Path
from typing import Any

import torch

import models
from eval.answering import answer_all
from eval.examinee import Examinee
from eval.task import Suite, Task


def examinee(checkpoint: Path, architecture: str = "llama", **changes: Any) -> Examinee:
    """A model in float32 with its tokenizer."""
    model = models.load(checkpoint, dtype=torch.float32).eval()
    parts: dict[str, Any] = {"max_tokens": model.max_tokens, "loaded": model, **changes}
    return Examinee(tokenizer=models.load_tokenizer(checkpoint), architecture=architecture, **parts)


def values(task: Task, who: Examinee, limit: int | None = None, **options: Any) -> list[dict[str, Any]]:
    """What each document scores."""
    documents = task.documents[:limit]
    asked = [task.requests(document, who) for document in documents]
    answers = iter(answer_all(who, [request for each in asked for request in each], **options))
    return [
        task.score(document, [next(answers) for _ in requests])
        for document, requests in zip(documents, asked, strict=True)
    ]


def scores(suite: Suite, who: Examinee, **options: Any) -> dict[str, tuple[float, float | None]]:
    """Value and standard error of each metric of the only task."""
    (task,) = suite.tasks
    found = values(task, who, **options)
    having = {name: [value[name] for value in found if name in value] for name in task.metrics}
    return {
        name: (task.metrics[name].aggregate(given), task.metrics[name].stderr(given))
        for name, given in having.items()
        if given
    }


@torch.inference_mode()
def log_probability(model: Any, before: list[int], after: list[int]) -> float:
    """The plain sum: all logits of one row, a softmax in float64, a token at a time."""
    logits = model(torch.tensor([[*before, *after]]))[0].double()
    places = range(len(before), len(before) + len(after))
    return sum(logits[place - 1].log_softmax(0)[([*before, *after])[place]].item() for place in places)
