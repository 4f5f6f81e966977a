"""GLUE's metrics against scipy and the definitions written out, ties and constant predictions included."""

import doctest
import math
import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

import eval.glue.metrics as metrics
from eval.glue.metrics import UndefinedScore, accuracy, f1, matthews, pearson, spearman
from eval.glue.resampling import METRICS, pearson_weighted, reported, spearman_weighted
from eval.statistics import bootstrap_stderr, counted_bootstrap_stderr

binary = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40)
classes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40)
tied = st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 3)), min_size=3, max_size=40)
real = st.floats(-100, 100, allow_subnormal=False).map(lambda value: round(value, 6))
free = st.lists(st.tuples(real, real), min_size=3, max_size=40)


def split(pairs):
    return [a for a, _ in pairs], [b for _, b in pairs]


@given(pairs=classes)
def test_accuracy_is_the_share_that_agrees(pairs):
    assert accuracy(*split(pairs)) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


@given(pairs=binary)
def test_f1_is_the_harmonic_mean_of_precision_and_recall_of_class_1(pairs):
    hits = pairs.count((1, 1))
    predicted, there = (sum(side) for side in (split(pairs)[1], split(pairs)[0]))
    if not (predicted and there):
        with pytest.warns(UndefinedScore, match="no 1 is (predicted|a label).*F1 is 0"):
            assert f1(*split(pairs)) == 0.0
        return
    precision, recall = hits / predicted, hits / there
    expected = 2 * precision * recall / (precision + recall) if hits else 0.0
    assert f1(*split(pairs)) == pytest.approx(expected)


@given(pairs=binary)
def test_matthews_of_two_classes_is_pearsons_of_zeros_and_ones(pairs):
    """The phi coefficient, by algebra."""
    assume(all(len(set(side)) == 2 for side in split(pairs)))
    assert matthews(*split(pairs)) == pytest.approx(scipy.stats.pearsonr(*split(pairs)).statistic, abs=1e-12)


@given(pairs=classes)
def test_matthews_of_more_classes_is_the_covariance_of_their_indicators(pairs):
    """Gorodkin (2004), written out."""
    assume(all(len(set(side)) > 1 for side in split(pairs)))
    x, y = (np.eye(4)[list(side)] for side in split(pairs))
    x, y = x - x.mean(0), y - y.mean(0)
    expected = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert matthews(*split(pairs)) == pytest.approx(expected, abs=1e-12)


@given(pairs=st.one_of(tied, free))
def test_correlations_are_scipys_with_and_without_ties(pairs):
    assume(all(max(side) - min(side) > 1e-3 for side in split(pairs)))
    assert pearson(*split(pairs)) == pytest.approx(scipy.stats.pearsonr(*split(pairs)).statistic, abs=1e-8)
    assert spearman(*split(pairs)) == pytest.approx(scipy.stats.spearmanr(*split(pairs)).statistic, abs=1e-12)


def test_values_by_hand():
    labels, predictions = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 0]  # TP 2, FN 2, FP 1, TN 3
    assert accuracy(labels, predictions) == 5 / 8
    assert f1(labels, predictions) == pytest.approx(4 / 7)
    assert matthews(labels, predictions) == pytest.approx((2 * 3 - 1 * 2) / math.sqrt(3 * 4 * 4 * 5))
    assert pearson([1, 2, 3], [1, 2, 4]) == pytest.approx(3 / math.sqrt(2 * 14 / 3))
    assert spearman([1, 2, 3, 4], [10, 20, 20, 40]) == pytest.approx(4.5 / math.sqrt(5 * 4.5))


@pytest.mark.parametrize("measure", [matthews, pearson, spearman])
@pytest.mark.parametrize(("labels", "predictions"), [([0, 1, 1], [0.1] * 3), ([0.1] * 3, [0, 1, 1]), ([1], [1])])
def test_a_constant_side_is_0_with_a_warning(measure, labels, predictions):
    with pytest.warns(UndefinedScore, match=r"all (predictions|labels) are .*has no value and is 0"):
        assert measure(labels, predictions) == 0.0


def test_f1_of_constant_predictions_is_0_with_a_warning_or_what_the_definition_gives():
    with pytest.warns(UndefinedScore, match="no 1 is predicted, so precision has no value"):
        assert f1([0, 1, 1], [0, 0, 0]) == 0.0
    assert f1([0, 1, 1], [1, 1, 1]) == pytest.approx(0.8)


@given(scale=st.sampled_from([1e-300, 1e-160, 1.0, 1e160, 1e307]), pairs=tied)
def test_no_size_of_numbers_overflows(scale, pairs):
    labels, predictions = split(pairs)
    assume(len(set(labels)) > 1 and len(set(predictions)) > 1)
    large = [value * scale for value in predictions]
    assert pearson(labels, large) == pytest.approx(pearson(labels, predictions), abs=1e-9)


@pytest.mark.parametrize(
    ("labels", "predictions", "says"),
    [
        ([], [], r"shape \(0,\)"),
        ([1, 0], [1], r"labels have shape \(2,\) and predictions \(1,\)"),
        ([1, 0], [1, math.nan], "predictions hold nan"),
        ([math.inf, 0], [1, 2], "labels hold inf"),
    ],
)
def test_what_cannot_be_scored_is_refused(labels, predictions, says):
    for measure in metrics.MEASURES.values():
        with pytest.raises(ValueError, match=says):
            measure(labels, predictions)


# Standard errors


def plain(measure, pairs, draws=1500):
    """The bootstrap written out: documents drawn, and the metric computed of each resample."""
    table = np.array(pairs, dtype=np.float64)

    def resampled(indices):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UndefinedScore)
            return np.array([measure(*table[row].T) for row in indices])

    return bootstrap_stderr(resampled, len(pairs), draws, seed=5)


def noisy(count, seed=0):
    random = np.random.default_rng(seed)
    labels = np.round(random.random(count) * 10) / 2
    return np.stack([labels, np.round(labels + random.normal(size=count), 1)], axis=1).tolist()


@pytest.mark.parametrize("name", ["f1", "matthews"])
def test_counts_that_are_drawn_give_the_error_of_documents_that_are_drawn(name):
    pairs = [[float(a > 2), float(b > 2.4)] for a, b in noisy(30)]
    found, expected = METRICS[name].stderr(pairs), plain(metrics.MEASURES[name], pairs)
    assert found == pytest.approx(expected, rel=0.08)  # 1,500 draws err by 2 %


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("count", [5, 60])
def test_correlations_of_resamples_are_those_of_the_documents_drawn(name, count):
    pairs = noisy(count)
    table, random = np.array(pairs), np.random.default_rng(1)
    counts = random.multinomial(count, np.full(count, 1 / count), size=30)
    weighted = pearson_weighted if name == "pearson" else spearman_weighted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedScore)
        expected = [metrics.MEASURES[name](*np.repeat(table, row, axis=0).T) for row in counts]
    np.testing.assert_allclose(weighted(*table.T)(counts), expected, atol=1e-9)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_the_error_of_a_correlation_is_that_of_documents_drawn(name):
    pairs = noisy(12)
    assert METRICS[name].stderr(pairs) == pytest.approx(plain(metrics.MEASURES[name], pairs), rel=0.1)


def test_a_resample_of_one_document_alone_has_a_correlation_of_0():
    values = np.random.default_rng(0).normal(size=60)  # of which some squares are rounded, so that a spread seems left
    table = np.stack([values, values], axis=1)
    for weighted in (pearson_weighted, spearman_weighted):
        assert weighted(*table.T)(60 * np.eye(60, dtype=int)).tolist() == [0] * 60


@pytest.mark.parametrize("count", [2, 10, 1000])
def test_drawn_counts_have_the_error_of_a_share_by_algebra(count):
    found = counted_bootstrap_stderr(lambda counts: counts[:, 1] / count, np.array([count // 2, count - count // 2]))
    assert found == pytest.approx(math.sqrt(0.25 / count), rel=0.01)


@pytest.mark.parametrize("name", METRICS)
def test_one_document_has_no_error_and_equal_ones_have_none_to_speak_of(name):
    one = 1.0 if name == "accuracy" else [1.0, 1.0]
    assert METRICS[name].stderr([one]) is None
    assert METRICS[name].stderr([one] * 5) == 0.0


def test_forty_thousand_documents_take_no_longer_than_a_hundred():
    pairs = noisy(100) * 400
    binary = [[float(a > 2), float(b > 2.4)] for a, b in pairs]
    for name in ("f1", "matthews"):
        few, many = METRICS[name].stderr(binary[:100]), METRICS[name].stderr(binary)
        assert few is not None
        assert many == pytest.approx(few / 20, rel=0.05)  # as the root of the count


def test_names_in_results_are_the_harnesss():
    assert [reported(name) for name in METRICS] == ["acc", "f1", "mcc", "pearson", "spearman"]
    assert METRICS["accuracy"].aggregate([1.0, 0.0, 0.0, 1.0]) == 0.5
    assert METRICS["matthews"].aggregate([[1, 1], [0, 0], [1, 0], [0, 0]]) == pytest.approx(1 / math.sqrt(3))
    assert all(metric.higher_is_better for metric in METRICS.values())


def test_the_examples_in_the_docstrings_hold():
    import eval.glue.prompted
    import eval.glue.tasks

    for module in (metrics, eval.glue.tasks, eval.glue.prompted):
        assert doctest.testmod(module).failed == 0
