"""The paper's Figure 6 beside plans: its own arithmetic comes out to the digit, and parts sum up to totals."""

import pytest

from benchmarks import figure6
from benchmarks.training import TINY
from train.planner.gpus import gpu


@pytest.fixture(scope="module")
def row():
    """LLaMA 7B with and without double quantization."""
    return figure6.row(
        "llama-7b",
        {
            way: figure6.plan(figure6.changed("llama-7b", **changes), "cuda")
            for way, changes in list(figure6.CHANGES.items())[:2]
        },
    )


def test_the_papers_adapters_and_states_are_its_own_formula(row):
    why = row["explained"]
    assert why["adapters_18hL64"] == row["paper_MiB"]["adapters"] == 288
    assert why["optimizer_8_bytes_of_18hL64"] == row["paper_MiB"]["optimizer"] == 1152
    assert why["adapter_numbers"] == 159_907_840
    assert why["adapter_numbers_over_18hL64"] == pytest.approx(1.059, abs=1e-3)


def test_the_difference_of_the_models_is_told_in_parts_that_sum_up(row):
    why = row["explained"]
    weights, others = 6_476_005_376, 2 * 32000 * 4096 + 65 * 4096
    plain = (weights / 2 + weights / 64 * 4 + 2 * others) / 2**20
    assert row["ours_MiB"]["NF4"]["model"] == pytest.approx(plain, rel=1e-3)
    assert why["model"] == pytest.approx(4475, abs=1)  # no double quantization, 32-bit embedding and head
    known = why["no_double_quantization"] + why["wide_embedding_and_head"]
    assert known + why["model_unexplained"] == pytest.approx(why["model_difference"])
    assert why["model_share_explained"] == pytest.approx(known / why["model_difference"])


def test_parts_sum_up_to_totals(row):
    assert sum(row["paper_MiB"].values()) == pytest.approx(6.9 * 1024)
    for way, parts in row["ours_MiB"].items():
        assert sum(parts.values()) == pytest.approx(1024 * row["total_GiB"][way])
        assert row["not_pageable_GiB"][way] == pytest.approx(row["total_GiB"][way] - parts["optimizer"] / 1024)


def test_what_fits_is_whole_paged_or_not(row):
    planned = figure6.plan(figure6.changed("llama-7b"), "cuda")
    assert row["fits"]["NF4+DQ"] == {"24GB": "whole", "48GB": "whole"}
    takes = planned.takes(gpu("24GB")) / 2**30
    assert figure6.fitting(planned, gpu(f"{takes + 0.01}")) == "paged"
    assert figure6.fitting(planned, gpu(f"{takes - 0.01}")) == "not"


def test_a_small_model_is_planned_and_measured():
    found = figure6.measured(figure6.Small("tiny", TINY.to_dict()), "cpu")
    planned, measured = found["planned_MiB"], found["measured_MiB"]
    for part in ("model", "adapters", "gradients", "optimizer"):
        assert measured[part] == pytest.approx(planned[part], rel=1e-6), part
    assert measured["activations"] == pytest.approx(planned["activations"], rel=0.15)
    assert sum(measured.values()) == pytest.approx(found["measured_total_MiB"])


def test_the_figure_is_told_and_drawn(row, tmp_path, capsys):
    from rich.console import Console

    found = {"rows": [row], "measured": []}
    figure6.show_figure(found, Console(width=160))
    told = " ".join(capsys.readouterr().out.split())
    assert "571 are not explained" in told
    assert "NF4+DQ: 24GB: fits, 48GB: fits" in told
    axes = figure6.draw(found["rows"], tmp_path / "figure6.png").axes[0]
    assert (tmp_path / "figure6.png").stat().st_size > 1000
    assert len(axes.patches) == 3 * len(figure6.PARTS)  # the paper's bar and two of ours
