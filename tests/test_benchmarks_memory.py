"""The memory benchmark: parts of a small model, counted under an optimizer in a process of its own."""

import json

import pytest

import qlora
from benchmarks import memory, training, updates
from benchmarks.training import TINY, Setting

SMALL = Setting(config=TINY, batch=2, tokens=16)


def test_parts_are_those_of_the_tensors(monkeypatch):
    monkeypatch.setattr(memory, "NAMES", ("paged-adamw", "adamw-8bit"))
    full, eight = memory.measure(SMALL)
    assert (full["optimizer"], full["states_in"], full["managed_bytes"]) == ("paged-adamw", "ordinary", 0)
    assert full["adapters_bytes"] == full["gradients_bytes"] == eight["adapters_bytes"]
    elements = full["adapters_bytes"] / 4
    assert full["optimizer_bytes"] == pytest.approx(8 * elements, rel=0.25)  # room between small matrices
    assert eight["optimizer_bytes"] == pytest.approx(2.03 * elements, rel=0.25)
    assert full["peak_above_start_bytes"] > 0


def test_a_setting_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"measuring lion failed: .*CUDA"):
        memory.measured_apart(Setting(config=TINY, device="cuda:99", optimizer="lion"))


def test_the_command_shows_managed_states_as_a_part_of_their_own(monkeypatch, capsys):
    rows = [
        {"optimizer": name, **dict.fromkeys(memory.PARTS, 2**20), "managed_bytes": managed}
        for name, managed in (("adamw", 0), ("paged-adamw", 3 * 2**20))
    ]
    times = [{"case": "few", "ours_ms": 1.5, "bitsandbytes_ms": None}]
    monkeypatch.setattr(memory, "measure", lambda setting: rows)
    monkeypatch.setattr("benchmarks.figure6.measure", lambda device: {"rows": [], "measured": []})
    monkeypatch.setattr(updates, "measure", lambda device, repeats: times)
    assert qlora.main(["bench", "memory", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (managed,) = [line for line in lines if "states in managed memory" in line]
    assert [cell.strip() for cell in managed.strip("│").split("│")][1:] == ["0", "3"]
    assert any("few" in line and "1.5" in line for line in lines)

    assert qlora.main(["bench", "memory", "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["updates"]) == (rows, times)
    assert result["setting"]["optimizer"] == training.Setting().optimizer
