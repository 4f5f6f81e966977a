"""Ablations: sweeps are read as they stand, differences are taken seed by seed, and a toy run is a training."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks import ablation, ablation_toy
from benchmarks.command import BenchOptions
from models import ConfigError, DataError, LoraConfig
from train.sweep.grid import read_sweep
from train.sweep.report import interval

SWEEP = """model = "nowhere"
out = "runs"
seeds = [1, 2, 3]
vary_data = true
max_steps = 1
[data]
path = "texts.jsonl"
[[cells]]
"lora.rank" = 4
[[cells]]
"lora.rank" = 8
[[cells]]
"lora.rank" = 16
"""
LOSSES = {(4, 1): 2.0, (4, 2): 3.0, (4, 3): 4.0, (8, 1): 1.9, (8, 2): 2.8, (8, 3): 3.9, (16, 2): 2.5}


@pytest.fixture
def made(tmp_path):
    """A sweep file, and runs as they would be left: all seeds of two ranks, one of the third."""
    path = tmp_path / "sizes.toml"
    path.write_text(SWEEP)
    for cell in read_sweep(path, out=str(tmp_path / "runs" / "sizes")).cells:
        loss = LOSSES.get((cell.point["lora.rank"], cell.config.seed))
        if loss is None:
            continue
        run = cell.config.directory()
        (run / "adapter").mkdir(parents=True)
        (run / "config.toml").write_text("")
        (run / "STATUS").write_text("done\n")
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "split": "eval", "loss": loss, "labels": 5}) + "\n")
        weights = {"a": torch.zeros(cell.point["lora.rank"], 3), "b": torch.zeros(2)}
        save_file(weights, run / "adapter" / "adapter_model.safetensors")
    return path


def bench(path, **options):
    return ablation.bench(BenchOptions(name="ablation", data=(f"sizes={path}",), **options), Console(quiet=True))


def test_differences_are_taken_within_a_seed(made, tmp_path):
    found = bench(made, work=str(tmp_path / "runs"), out=str(tmp_path / "a.json"))["sweeps"]["sizes"]
    first, second, third = found["rows"]
    assert [row["trained"] for row in found["rows"]] == [14, 26, 50]
    assert (found["done"], found["cells"]) == (7, 9)
    assert first["over_reference"] == {"mean": 0.0, "half": 0.0, "n": 3}
    expected = interval([-0.1, -0.2, -0.1])
    assert second["over_reference"]["mean"] == pytest.approx(expected.mean)
    assert second["over_reference"]["half"] == pytest.approx(expected.half)
    assert second["over_reference"]["half"] < second["loss"]["half"] / 10
    assert (third["seeds"], third["over_reference"]["mean"], third["over_reference"]["half"]) == ([2], -0.5, None)
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_sweep_of_which_nothing_is_done_or_that_is_not_named_is_refused(made, tmp_path):
    with pytest.raises(DataError, match="none of its cells is done"):
        bench(made, work=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="data is given as NAME=PATH"):
        ablation.bench(BenchOptions(name="ablation", data=(str(made),)), Console(quiet=True))
    with pytest.raises(ConfigError, match="which sweeps"):
        ablation.bench(BenchOptions(name="ablation"), Console(quiet=True))


@pytest.mark.parametrize("file", sorted(Path("benchmarks/sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_sweeps_can_be_read(file):
    if not file.name.startswith("base-"):
        assert len(read_sweep(file, model="m", out="o").cells) >= 3


def test_a_toy_run_learns_and_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_toy, "STEPS", 2)
    monkeypatch.setattr(ablation_toy, "LENGTH", 12)
    monkeypatch.setattr(ablation_toy, "POOL", 24)
    monkeypatch.setattr(ablation_toy, "HELD_OUT", 4)
    monkeypatch.setattr(
        ablation_toy, "settings", lambda: [ablation_toy.Setting("layers", "few", ablation_toy.LORA, (1e-2,))]
    )
    ablation_toy.stories.cache_clear()
    found = ablation_toy.measure(str(ablation_toy.STORIES), 1, torch.device("cpu"), str(tmp_path))
    (row,) = found["rows"]
    assert row["loss"]["mean"] < found["untrained_loss"]
    assert row["trained"] == 5 * 8 * 1156
    monkeypatch.setattr(ablation_toy, "trained", None)  # what was measured is not measured again
    again = ablation_toy.measure(str(ablation_toy.STORIES), 1, torch.device("cpu"), str(tmp_path))
    assert again == found
    monkeypatch.setattr(ablation_toy, "STEPS", 3)
    with pytest.raises(ConfigError, match="holds results with the steps 2, but this run's is 3"):
        ablation_toy.measure(str(ablation_toy.STORIES), 1, torch.device("cpu"), str(tmp_path))
    ablation_toy.stories.cache_clear()


def test_settings_that_are_compared_by_layers_train_as_many_numbers():
    count = {"q_proj": 128, "k_proj": 96, "v_proj": 96, "o_proj": 128, **dict.fromkeys(ablation_toy.FEED_FORWARD, 236)}
    for setting in ablation_toy.settings():
        if setting.group == "layers":
            assert isinstance(setting.adapter, LoraConfig)
            targets = setting.adapter.target_modules
            layers = count if targets == "all-linear" else targets
            assert setting.adapter.rank * sum(count[name] for name in layers) == pytest.approx(8 * 1156, rel=0.05)
