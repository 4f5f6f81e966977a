"""The test of normality: what it says of rows whose distribution is known, and of the rows that it leaves out."""

import json

import numpy as np
import pytest
from scipy import stats

import qlora
from benchmarks import normality
from tests import tiny


def rows_of(kind, rows=300, length=64):
    generator = np.random.default_rng(0)
    return {"normal": generator.standard_normal, "uniform": generator.random}[kind]((rows, length))


def test_of_normal_rows_one_in_twenty_is_not_and_of_uniform_ones_nearly_all():
    normal, uniform = (normality.tested(rows_of(kind), 0) for kind in ("normal", "uniform"))
    assert 0.01 < (normal.p < 0.05).mean() < 0.10
    assert (uniform.p < 0.05).mean() > 0.6
    assert abs(np.median(normal.kurtosis)) < 0.3
    assert np.median(uniform.kurtosis) == pytest.approx(-1.2, abs=0.1)
    assert np.median(normal.quantiles, axis=1) == pytest.approx(stats.norm.ppf(normality.QUANTILES), abs=0.3)


def test_the_place_and_the_scale_of_a_row_make_no_difference():
    rows = rows_of("normal", rows=5)
    moved = normality.tested(3 + 0.01 * rows, 0)
    assert moved.p == pytest.approx([stats.shapiro(row).pvalue for row in rows], rel=1e-4)


def test_a_row_of_equal_values_is_counted_and_of_a_long_one_a_part_is_tested(monkeypatch):
    rows = rows_of("normal", rows=4)
    rows[1] = 0.5
    found = normality.tested(rows, 0)
    assert (len(found.p), found.constant, found.length) == (3, 1, 64)
    monkeypatch.setattr(normality, "LONGEST", 20)
    found = normality.tested(rows, 0)
    assert (len(found.p), found.length) == (3, 20)


def test_a_control_has_the_mean_and_spread_of_its_row_and_is_stored_as_the_file_stores():
    rows = 5 + 2 * rows_of("uniform", rows=20, length=1024)
    control = normality.normal_like(rows, 0)
    assert control.mean(1) == pytest.approx(rows.mean(1), abs=0.1)
    assert control.std(1) == pytest.approx(rows.std(1), rel=0.2)
    assert normality.as_stored(control, None) == pytest.approx(control, rel=1e-6)
    stored = normality.as_stored(control, "Q4_1")
    assert not np.array_equal(stored, control)
    assert all(len(np.unique(block)) <= 16 for block in stored.reshape(-1, 32)[:50])


def test_the_share_has_wilsons_interval():
    found = normality.share(np.array([0.01] * 10 + [0.5] * 90))
    assert found["value"] == 0.1
    assert (found["low"], found["high"]) == pytest.approx((0.0552, 0.1744), abs=1e-4)  # Wilson (1927) for 10 of 100


def test_the_verb_tells_every_kind_of_layer(tmp_path, capsys):
    out = tmp_path / "normality.json"
    model = tiny.checkpoint(tmp_path / "tiny")
    assert qlora.main(["bench", "normality", "--model", str(model), "--limit", "40", "--out", str(out), "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert json.loads(out.read_text()) == found
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    kinds = {row["kind"]: row for row in found["rows"]}
    assert list(kinds)[:2] == ["self_attn.q_proj", "self_attn.k_proj"]
    assert kinds["mlp.down_proj"]["values"] == [128]
    assert kinds["self_attn.k_proj"]["units"] == 2 * 32  # there are no more
    units = [row["units"] for kind, row in kinds.items() if kind != "all"]
    assert kinds["all"]["units"] == sum(units) == 2 * (32 * 2 + 40 * 5)
    assert kinds["all"]["not_normal"]["value"] < 0.12  # its weights are drawn from a normal distribution
    assert "5%" in shown.err
