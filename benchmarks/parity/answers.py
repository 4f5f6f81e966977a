"""What a fine-tuned model answers: for each question of a task a score, in the order of its file.

A task with words asks which of them is the most probable behind the prompt, by one pass through the model; a model with
a head of classes gives one at once; of all else it is the loss on each example's answer.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mode

from torch import Tensor

from benchmarks.parity.tasks import Task
from eval.answering import answer_all
from eval.examinee import Examinee
from eval.held_out import held_out_loss
from eval.labels import predict
from eval.likelihood import in_one_row, likelihood
from eval.loading import load_examinee
from models.labelled import labelling
from models.target import LoadOptions
from train.data import DataConfig, load_data, padding_id
from train.data.batches import Batches
from train.task import TASKS

BATCH = 32


def answers(target: Path | str, task: Task, device: str) -> list[float]:
    """A score for each question of the test: 1 for a right answer and 0 for a wrong one, or nats per label token."""
    who = load_examinee(target, LoadOptions(device=device))
    if task.words:
        return chosen_words(who, task)
    if task.measure == "accuracy":
        found = predict(labelling(who.model), batches(who, task, "test", BATCH))
        return (found.logits.argmax(dim=1) == found.labels).double().tolist()
    return [held_out_loss(who.model, [batch]).loss for batch in batches(who, task, "test", 1)]


def answers_before(task: Task, device: str) -> list[float]:
    """The scores of the model as it is; one without a head of classes says always what is most frequent in the test."""
    if task.words or task.measure == "loss":
        return answers(task.model, task, device)
    labels = [json.loads(line)["label"] for line in task.file("test").read_text("utf-8").splitlines()]
    return [float(label == mode(labels)) for label in labels]


def tuning_loss(target: Path | str, task: Task, device: str) -> float:
    """Mean loss on the examples that choose a learning rate: nats per label token, or per label."""
    who = load_examinee(target, LoadOptions(device=device))
    inputs = batches(who, task, "tune", BATCH, by_length=True)
    if who.architecture == "roberta":
        return predict(labelling(who.model), inputs).loss
    return held_out_loss(who.model, inputs).loss


def chosen_words(who: Examinee, task: Task) -> list[float]:
    """Whether the most probable word is the right one."""
    records = [json.loads(line) for line in task.file("test").read_text("utf-8").splitlines()]
    asked = [in_one_row([likelihood(who, it["prompt"], f" {word}") for word in task.words]) for it in records]
    found = iter(answer_all(who, [request for each in asked for request in each]))
    scores = []
    for record in records:
        values = [next(found)[0] for _ in task.words]
        scores.append(float(record["completion"].strip() == task.words[values.index(max(values))]))
    return scores


def batches(who: Examinee, task: Task, part: str, size: int, by_length: bool = False) -> Iterator[dict[str, Tensor]]:
    """A part's examples as the model takes them, in the file's order or by length."""
    config = DataConfig(path=str(task.file(part)), eval_size=0, **task.data)
    data = load_data(config, who.tokenizer, TASKS[who.architecture][0])
    made = Batches(data.train, size, padding_id(who.tokenizer), group_by_length=by_length)
    return (batch.inputs for batch in made.epoch(0))
