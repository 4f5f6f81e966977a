"""`qlora train` under each optimizer: it learns, and whether states are paged changes nothing that is written."""

import json
from contextlib import redirect_stdout
from functools import lru_cache
from io import StringIO

import pytest

import qlora
from tests import tiny
from train.optimizer import NAMES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Make a run under an optimizer, once: its directory, and what the command printed."""
    folder = tmp_path_factory.mktemp("optimizers")
    model, data = tiny.checkpoint(folder / "model"), tiny.records(folder / "colours.jsonl", 24)
    settings = ["--model", str(model), "--data.path", str(data), "--max-steps", "6", "--batch-size", "4"]

    @lru_cache
    def made(name, *flags):
        out = folder / f"{name}{len(flags)}"
        rate = "3e-3" if name == "lion" else "2e-2"
        optimizer = ["--optimizer.name", name, "--optimizer.learning-rate", rate, *flags]
        printed = StringIO()
        with redirect_stdout(printed):
            code = qlora.main(["train", *settings, "--accumulation", "1", "--out", str(out), "--json", *optimizer])
        assert code == 0
        return out, json.loads(printed.getvalue())

    return made


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "eval"]


@pytest.mark.parametrize("name", NAMES)
def test_held_out_loss_falls_and_the_states_are_counted(name, run):
    out, result = run(name)
    first, *_, last = losses(out)
    assert last < first - 0.02
    assert f'name = "{name}"' in (out / "config.toml").read_text()
    assert result["optimizer"]["state_bytes"] > 0
    assert result["optimizer"]["managed_bytes"] == 0


@pytest.mark.parametrize("name", ["adamw", "adamw-8bit"])
def test_paging_changes_no_digit_of_a_run(name, run):
    (plain, _), (paged, _) = run(name), run(f"paged-{name}")
    assert (plain / "metrics.jsonl").read_bytes() == (paged / "metrics.jsonl").read_bytes()
    weights = "adapter/adapter_model.safetensors"
    assert (plain / weights).read_bytes() == (paged / weights).read_bytes()


def test_lora_plus_goes_with_paged_states_of_8_bits(run):
    (plain, _), (plus, _) = run("paged-adamw-8bit"), run("paged-adamw-8bit", "--optimizer.lora-plus-ratio", "4")
    assert losses(plain)[-1] != losses(plus)[-1]
