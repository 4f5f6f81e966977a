"""Standard errors: closed forms against their definitions, resampling against a known spread."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from eval.statistics import bootstrap_stderr, equal_stderr, mean, mean_stderr, pooled_stderr

numbers = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50)


@given(values=numbers)
def test_a_mean_and_its_error_are_scipys(values):
    assert mean(values) == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    assert mean_stderr(values) == pytest.approx(scipy.stats.sem(values), rel=1e-6, abs=1e-6)


def test_a_single_value_has_no_error():
    assert mean_stderr([1.0]) is None
    assert pooled_stderr([0.0], [1]) is None
    assert bootstrap_stderr(lambda indices: indices.mean(axis=1), 1) is None


def test_pooling_is_the_error_of_all_documents_with_each_tasks_own_mean():
    groups = [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0, 0.0]]
    squares = sum((value - mean(group)) ** 2 for group in groups for value in group)
    expected = math.sqrt(squares / (8 - 2) / 8)
    errors = [mean_stderr(group) or 0.0 for group in groups]
    assert pooled_stderr(errors, [3, 5]) == pytest.approx(expected)


def test_the_error_of_a_plain_mean_adds_squares():
    assert equal_stderr([0.3, 0.4]) == pytest.approx(0.25)


def test_resampling_finds_the_error_of_a_mean_and_the_same_each_time():
    values = np.random.default_rng(0).normal(size=200)

    def means(indices):
        return values[indices].mean(axis=1)

    found = bootstrap_stderr(means, 200, draws=20_000)
    assert found == pytest.approx(values.std() / math.sqrt(200), rel=0.03)
    assert found == bootstrap_stderr(means, 200, draws=20_000)
