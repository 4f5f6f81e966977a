"""Predictions of labels: the same loss as training's, and two measures of agreement."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
from eval.labels import accuracy, pearson, predict
from models.labelled import labelling
from tests import tiny_roberta

floats = st.lists(st.integers(-20, 20), min_size=3, max_size=9)


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


def test_accuracy_is_the_share_of_right_classes():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    assert accuracy(logits, torch.tensor([0, 1, 1, 1])) == 0.75


@given(values=floats, seed=st.integers(0, 99))
def test_pearson_is_numpys(values, seed):
    others = np.random.default_rng(seed).normal(size=len(values))
    found = pearson(torch.tensor(values, dtype=torch.float32), torch.tensor(others))
    if len(set(values)) == 1:
        assert found == 0.0
    else:
        assert found == pytest.approx(np.corrcoef(values, others)[0, 1], abs=1e-5)


def test_constant_predictions_correlate_with_nothing():
    assert pearson(torch.full((7,), 0.1), torch.arange(7.0)) == 0.0
    assert pearson(torch.arange(7.0), torch.full((7,), 0.1)) == 0.0
