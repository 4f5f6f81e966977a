"""The report on several GPUs, which is arithmetic on plans."""

import json

import pytest

import qlora
from benchmarks import command, scale
from train.planner.gpus import GIB
from train.planner.plan import LABELS


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scale, "PROCESSES", (1, 2))
        return scale.measure(("llama-7b",))


def test_every_way_is_told_with_what_it_takes_and_sends(rows):
    alone, ddp, fsdp, offload = rows
    assert [row["way"] for row in rows] == ["alone", *scale.WAYS]
    assert alone["sent_in_step_bytes"] == 0
    assert alone["times"] == {}
    assert alone["not_pageable_bytes"] < ddp["not_pageable_bytes"]  # copies of gradients
    assert offload["tensors_bytes"] < fsdp["tensors_bytes"] < alone["tensors_bytes"]
    assert fsdp["parts"]["codes"] == alone["parts"]["codes"] / 2
    assert offload["host_bytes"] > fsdp["parts"]["codes"]
    assert fsdp["sent_in_round_bytes"] == offload["sent_in_round_bytes"] > ddp["sent_in_round_bytes"] == 0
    assert ddp["sent_in_step_bytes"] == 4 * 159_907_840  # twice half of the adapters' gradients, in float32
    assert all(row["smallest_gpu_GB"] * GIB > row["not_pageable_bytes"] for row in rows)


def test_what_is_sent_for_a_micro_batch_is_the_stored_model_once_and_its_blocks_again(rows):
    stored = sum(rows[0]["parts"][label] for label in (*list(LABELS)[:2], "embeddings", "norms", "head", "adapters"))
    whole = 2 * 32000 * 4096 * 2  # embedding and head, which stay from forward to backward
    assert 2 * rows[2]["sent_in_round_bytes"] == pytest.approx(2 * stored - whole, rel=1e-3)


def test_seconds_are_operations_and_bytes_over_speeds(rows):
    _, ddp, fsdp, offload = rows
    base, adapters, head = 6_476_005_376, 159_907_840, 32000 * 4096
    operations = 512 * (6 * base + 8 * adapters + 4 * head)
    name = "A100 SXM, NVLink 3"
    assert fsdp["times"][name]["products"] == pytest.approx(operations / (0.4 * 312e12))
    assert fsdp["times"][name]["sending"] == pytest.approx(fsdp["sent_in_round_bytes"] / 300e9)
    assert ddp["times"][name]["gradients_in_step"] == pytest.approx(4 * adapters / 300e9)
    brought = (fsdp["traffic"]["forward"] + fsdp["traffic"]["backward"]) / 2
    assert offload["times"][name]["sending"] == pytest.approx(brought / 31.5e9)  # slower than NVLink
    pcie = "RTX 4090, PCIe 4.0 x16"
    assert offload["times"][pcie]["sending"] == pytest.approx((fsdp["sent_in_round_bytes"] + brought) / 31.5e9)


def test_65b_on_two_gpus_of_24_gb_needs_something_else():
    first, *others = scale.two_small_gpus()
    assert not first["fits"]
    assert all(told["fits"] for told in others)
    assert others[-1]["host_bytes"] > 16 * GIB  # half of the base, in the CPU's memory of each


def test_the_verb_writes_numbers_and_a_picture(rows, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(scale, "measure", lambda: rows)
    monkeypatch.setattr(scale, "two_small_gpus", list)
    assert qlora.main(["bench", "scale", "--out", str(tmp_path / "scale.json"), "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads((tmp_path / "scale.json").read_text())
    assert json.loads(shown.out) == result
    assert result["device"] == "none: planned"
    assert len(result["rows"]) == 4
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    assert "llama-7b, 2 x fsdp" in shown.err


def test_groups_of_the_picture_are_all_there_is():
    grouped = [label for labels in scale.GROUPS.values() for label in labels]
    assert sorted([*grouped, "trained whole"]) == sorted(LABELS)
    assert "scale" in command.BENCHMARKS
