"""Predictions of labels: the same loss as training's, and how far they agree with labels."""

import math

import numpy as np
import pytest
import torch

import models
from eval.labels import Predictions, agreement, predict
from models.labelled import labelling
from tests import tiny_roberta


@pytest.mark.parametrize("labels", [("a", "b", "c"), ("number",)])
def test_the_loss_is_that_of_all_labels_at_once_whatever_the_batches(tmp_path, labels):
    model = labelling(models.load(tiny_roberta.checkpoint(tmp_path, labels), dtype=torch.float32)).train()
    ids, targets = torch.randint(4, 20, (6, 9)), torch.tensor([0, 2, -100, 1, 1, 0])
    parts = [{"input_ids": ids[rows], "labels": targets[rows]} for rows in (slice(0, 1), slice(1, 5), slice(5, 6))]
    found = predict(model, parts)
    assert model.training
    assert found.loss == pytest.approx(model.eval().loss(input_ids=ids, labels=targets).item(), rel=1e-5)
    assert found.labels.tolist() == [0, 2, 1, 1, 0]
    assert found.logits.shape == (5, len(labels))


def test_no_label_is_no_measure(tmp_path):
    model = labelling(models.load(tiny_roberta.checkpoint(tmp_path, ("a", "b"))))
    with pytest.raises(ValueError, match="no label to score"):
        predict(model, [{"input_ids": torch.tensor([[0, 5, 2]]), "labels": torch.tensor([-100])}])


def test_agreement_is_by_the_measures_that_are_asked_for():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    found = agreement(Predictions(logits, torch.tensor([0, 1, 1, 1]), 0.5), ("accuracy", "f1", "matthews"))
    assert found == pytest.approx({"accuracy": 0.75, "f1": 0.8, "matthews": 2 / 12**0.5})
    numbers = Predictions(torch.tensor([[1.0], [2.0], [9.0]]), torch.tensor([0.5, 1.0, 1.5]), 0.5)
    found = agreement(numbers, ("pearson", "spearman"))
    assert found == pytest.approx({"pearson": np.corrcoef([1, 2, 9], [1, 2, 3])[0, 1], "spearman": 1.0})


def test_a_measure_without_a_value_is_0_and_training_is_not_told():
    constant = Predictions(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 1, 1]), 0.5)
    assert agreement(constant, ("accuracy", "f1", "matthews")) == pytest.approx(
        {"accuracy": 1 / 3, "f1": 0.0, "matthews": 0.0}
    )
    assert agreement(Predictions(torch.full((7, 1), 0.1), torch.arange(7.0), 0.5), ("pearson",)) == {"pearson": 0.0}


def test_where_there_is_no_loss_there_is_no_agreement():
    broken = Predictions(torch.tensor([[math.nan], [1.0]]), torch.tensor([1.0, 2.0]), math.nan)
    assert agreement(broken, ("pearson", "spearman")) == {}
