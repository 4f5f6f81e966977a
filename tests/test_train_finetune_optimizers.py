"""`qlora train` under each optimizer: it learns, and whether states are paged changes nothing that is written."""

import json

import pytest

import qlora
from tests import tiny
from train.optimizer import NAMES


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run for every optimizer: what the command printed, and its directory."""
    folder = tmp_path_factory.mktemp("optimizers")
    model, data = tiny.checkpoint(folder / "model"), tiny.records(folder / "colours.jsonl", 24)

    def run(name, *flags):
        out = folder / f"{name}{len(flags)}"
        arguments = ["train", "--model", str(model), "--data.path", str(data), "--out", str(out), "--max-steps", "6"]
        rate = "3e-3" if name == "lion" else "2e-2"
        optimizer = ["--optimizer.name", name, "--optimizer.learning-rate", rate, *flags]
        assert (
            qlora.main([*arguments, "--batch-size", "4", "--accumulation", "1", "--quiet", "--json", *optimizer]) == 0
        )
        return out

    return run


def told(capsys):
    return json.loads(capsys.readouterr().out)


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "eval"]


@pytest.mark.parametrize("name", NAMES)
def test_held_out_loss_falls_and_the_states_are_counted(name, runs, capsys):
    out = runs(name)
    result = told(capsys)
    first, *_, last = losses(out)
    assert last < first - 0.02
    assert f'name = "{name}"' in (out / "config.toml").read_text()
    adapter = result["optimizer"]["state_bytes"]
    assert adapter > 0
    assert result["optimizer"]["managed_bytes"] == 0


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_paging_changes_no_digit_of_a_run(name, runs, capsys):
    plain, paged = runs(name), runs(f"paged-{name}")
    assert (plain / "metrics.jsonl").read_bytes() == (paged / "metrics.jsonl").read_bytes()
    weights = "adapter/adapter_model.safetensors"
    assert (plain / weights).read_bytes() == (paged / weights).read_bytes()


def test_lora_plus_goes_with_paged_states_of_8_bits(runs, capsys):
    plain, plus = runs("paged-adamw-8bit"), runs("paged-adamw-8bit", "--optimizer.lora-plus-ratio", "4")
    assert losses(plain)[-1] != losses(plus)[-1]
