"""The benchmark of optimizers' steps: who takes part, in what, and that all do the same."""

import importlib.util

import pytest
import torch

from benchmarks import correctness, updates
from kernels import dispatch


def test_the_sets_are_a_models_lora_matrices_and_a_full_fine_tune():
    lora, full = updates.SETS.values()
    assert (len(lora), sum(lora)) == (420, 4_884_480)  # as counted by hand: 30 layers of 162816
    assert sum(full) == 3 * 2**24


def test_a_row_tells_what_each_update_took_of_whom():
    rows = updates.measure("cpu", 1, {"two": [300, 5000]})
    assert [row["case"] for row in rows] == ["two, AdamW", "two, AdamW 8-bit", "two, Lion"]
    assert [row["state_bytes"] for row in rows] == [8 * 6144, 2 * (6144 + 256), 4 * 6144]
    # parameters begin at multiples of 1024 elements, and every kind of state at multiples of 256 bytes
    peer = bool(importlib.util.find_spec("bitsandbytes"))
    for row in rows:
        assert (row["elements"], row["tensors"]) == (5300, 2)
        assert row["ours_ms"] > 0
        assert (row["torch_foreach_ms"] is not None) == (row["torch_fused_ms"] is not None) == (row is rows[0])
        assert (row["bitsandbytes_ms"] is not None) == peer


def test_every_contestant_moves_the_parameters(monkeypatch):
    moved = []
    monkeypatch.setattr(torch, "randn", lambda *size, **_: moved.append(torch.ones(*size)) or moved[-1])
    contestants, _ = updates.contest([4096], torch.device("cpu"))
    for name, step in contestants.items():
        before = moved[0].clone()
        step()
        assert (moved[0] < before).any() or (moved[0] > before).any(), name


def test_an_update_that_is_not_the_definitions_is_found(monkeypatch):
    rows = list(correctness.updates(20, 30, torch.bfloat16, "cpu"))
    assert [row["operator"] for row in rows] == ["adamw", "adamw_8bit", "lion", "adamw in float32"]
    assert all(row["right"] for row in rows)

    find = dispatch.form

    def slightly_wrong(*about):
        def form(params, *rest):
            find(*about)(params, *rest)
            params[0][0] += 0.01

        return form

    monkeypatch.setattr(dispatch, "form", slightly_wrong)
    wrong = list(correctness.updates(20, 30, torch.bfloat16, "cpu"))
    assert not any(row["right"] for row in wrong)
    assert [row.get("different") for row in wrong] == [1, 1, 1, None]


@pytest.mark.parametrize("operator", ["adamw", "adamw_8bit", "lion"])
def test_states_of_zeros_decode_to_zero(operator):
    params = [torch.ones(300)]
    before = [p.clone() for p in params]
    states = correctness.zero_states(operator, params)
    assert len(states) == {"adamw": 2, "adamw_8bit": 4, "lion": 1}[operator]
    numbers = (
        correctness.LionNumbers(0.9, 0.99, 1.0, 1.0)
        if operator == "lion"
        else correctness.AdamWNumbers.of(1, 1.0, (0.9, 0.99), 1e-8, 0.0)
    )
    getattr(correctness.definitions, operator)(params, [torch.zeros(300)], *states, [numbers])
    assert torch.equal(params[0], before[0])
