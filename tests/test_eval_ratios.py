"""Perplexities and bits: totals over totals, and errors that agree with resampling."""

import math

import numpy as np
import pytest

from eval.ratios import BITS, PERPLEXITY, ratio, ratio_stderr
from eval.statistics import bootstrap_stderr, mean_stderr


def test_a_uniform_guess_among_eight_has_perplexity_8_and_3_bits():
    pairs = [(-5 * math.log(8), 5), (-2 * math.log(8), 2)]
    assert PERPLEXITY.aggregate(pairs) == pytest.approx(8, rel=1e-12)
    assert BITS.aggregate(pairs) == pytest.approx(3, rel=1e-12)
    assert PERPLEXITY.stderr(pairs) == pytest.approx(0, abs=1e-9)
    assert not PERPLEXITY.higher_is_better
    assert not BITS.higher_is_better


def test_long_documents_count_for_more():
    assert PERPLEXITY.aggregate([(-math.log(2) * 3, 3), (0.0, 1)]) == pytest.approx(2**0.75)


def test_with_equal_units_the_error_is_that_of_a_mean():
    values = [-1.0, -2.5, -4.0, -3.0]
    pairs = [(value * 7, 7) for value in values]
    error = mean_stderr(values)
    assert error is not None
    assert ratio_stderr(pairs) == pytest.approx(error)
    assert PERPLEXITY.stderr(pairs) == pytest.approx(math.exp(2.625) * error)
    assert BITS.stderr(pairs) == pytest.approx(error / math.log(2))


def test_errors_agree_with_resampling_where_documents_differ_in_length():
    draw = np.random.default_rng(0)
    units = draw.integers(50, 400, size=200)
    totals = -units * draw.normal(2.0, 0.2, size=200)
    pairs = [(float(total), int(unit)) for total, unit in zip(totals, units, strict=True)]
    for metric, transformed in ((PERPLEXITY, np.exp), (BITS, lambda nats: nats / math.log(2))):
        resampled = bootstrap_stderr(
            lambda rows, f=transformed: f(-totals[rows].sum(1) / units[rows].sum(1)), len(pairs), draws=20_000
        )
        assert metric.stderr(pairs) == pytest.approx(resampled, rel=0.03)


def test_a_single_document_has_no_error_and_an_impossible_text_is_infinite():
    assert ratio_stderr([(-3.0, 2)]) is None
    assert PERPLEXITY.stderr([(-3.0, 2)]) is None
    assert BITS.stderr([(-3.0, 2)]) is None
    assert ratio([(-3.0, 2)]) == -1.5
    impossible = [(-1e6, 2), (-2e6, 2)]
    assert PERPLEXITY.aggregate(impossible) == math.inf
    assert PERPLEXITY.stderr(impossible) is None
