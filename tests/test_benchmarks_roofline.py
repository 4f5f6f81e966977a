"""Places under a roof, from given numbers, and a roof that is measured."""

import dataclasses

import pytest
import torch

from benchmarks import generation, roofline, timing
from benchmarks.roofline import Limits, Work, all_placed, bound, placed
from benchmarks.training import TINY, built

ROOF = Limits(10.0, {"bfloat16": 100.0, "float32": 20.0})


@pytest.mark.parametrize(
    ("work", "seconds"),
    [(Work(100, 1), 1.0), (Work(100, 10), 1.0), (Work(100, 40), 4.0), (Work(0, 20), 2.0), (Work(200, 0), 2.0)],
)
def test_the_bound_is_the_slower_of_products_and_memory(work, seconds):
    assert bound(work, ROOF) == seconds


def test_a_place_has_what_is_attained_and_the_share_of_the_bound():
    place = placed(Work(100, 40), 8.0, ROOF)
    assert (place["intensity"], place["flop_s"], place["bytes_s"], place["share"]) == (2.5, 12.5, 5.0, 0.5)
    assert placed(Work(100, 1), 5.0, ROOF, "float32")["share"] == 1.0
    # The same by the usual formula: attained over min(peak, intensity x bandwidth).
    assert place["share"] == place["flop_s"] / min(ROOF.peak["bfloat16"], place["intensity"] * ROOF.bandwidth)


def test_only_known_works_are_placed_and_without_limits_none():
    works = {"ours": Work(1, 1), "dense": Work(1, 2)}
    assert all_placed(works, {"ours": 1.0, "stranger": 1.0}, ROOF).keys() == {"ours"}
    assert all_placed(works, {"ours": 1.0}, None) == {}


def test_limits_are_of_a_copy_and_of_products(monkeypatch):
    monkeypatch.setitem(timing.COPIED, "cpu", 1000)
    monkeypatch.setitem(timing.SIDE, "cpu", 16)
    monkeypatch.setattr(timing, "clock_of", lambda device: lambda work: work() is None or 0.5)
    found = roofline.limits("cpu", 2)
    assert found == Limits(4000.0, {"bfloat16": 4 * 16**3, "float32": 4 * 16**3})


def test_a_plot_has_a_point_for_each_contestant_that_multiplies(tmp_path):
    rows = [
        {
            "case": "matmul",
            "roofline": all_placed({"ours": Work(8, 4), "dense": Work(8, 8)}, {"ours": 1.0, "dense": 2.0}, ROOF),
        },
        {"case": "search", "roofline": all_placed({"ours": Work(0, 4)}, {"ours": 1.0}, ROOF)},
        {"case": "broken"},
    ]
    axes = roofline.draw(rows, ROOF, tmp_path / "roof.png").axes[0]
    assert (tmp_path / "roof.png").stat().st_size > 1000
    roof, *points = (torch.as_tensor(line.get_xydata()) for line in axes.lines)
    assert [point[0].tolist() for point in points] == [[2.0, 8.0], [1.0, 4.0]]
    assert roof[1].tolist() == [10.0, 100.0]  # the ridge


def test_what_a_token_reads_is_what_is_stored():
    models = {
        name: built(TINY, "cpu", make).eval() for name, make in generation.layers().items() if name != "bitsandbytes"
    }
    ours, dense = (generation.Sizes.of(models[name]) for name in ("ours", "dense"))
    assert ours.weights == dense.weights == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    head_and_norms = 2 * (300 * 64 + 5 * 64)
    assert dense.nbytes == 2 * dense.weights + head_and_norms
    assert 4.1 < 8 * (ours.nbytes - head_and_norms) / ours.weights < 4.5
    apart = built(dataclasses.replace(TINY, tie_word_embeddings=False), "cpu", generation.layers()["ours"])
    assert generation.Sizes.of(apart) == ours  # of an embedding that is not the head, a row is looked up
    one, eight = (generation.work(TINY, ours, batch, batch, 40) for batch in (1, 8))
    assert eight.operations == 8 * one.operations
    assert eight.nbytes - one.nbytes == 7 * (2 * 2 * 40 * 2 * 2 * 16)  # keys and values, 2 bytes, of both layers
    assert one.operations == 2 * (ours.weights + 300 * 64) + 4 * 2 * 64 * 40


def test_everyone_writes_with_the_same_weights():
    ids = torch.arange(12).view(2, 6)
    outputs = {name: built(TINY, "cpu", make).eval()(ids) for name, make in generation.layers().items()}
    expected = outputs.pop("dense")
    assert "ours" in outputs
    for name, logits in outputs.items():
        assert (logits - expected).float().norm() < 0.2 * expected.float().norm(), name
