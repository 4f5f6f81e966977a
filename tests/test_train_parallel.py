"""The same config means the same training on any number of processes: what two make is what one makes.

Everything that two processes do is done in one start of them, and everything that one does in this one.
"""

import json
from pathlib import Path

import pytest
import torch
from processes import together
from safetensors.torch import load_file
from training import commands

import models
from tests import tiny
from train.checkpoint import checkpoints

# 7 rows in micro-batches of two, three to a step: two whole ones and one that is cut, of two rows or of one; then a
# step of one micro-batch. The gradient's norm is far above the 0.3 at which it is clipped; blocks are recomputed.
SETTINGS = (
    "--max-steps 4 --batch-size 2 --accumulation 3 --save-steps 1 --keep-checkpoints 9 --lora.rank 3 --lora.dropout 0 "
    "--dtype float32 --device cpu --optimizer.learning-rate 5e-3 --data.eval-size 2 --quiet"
)
DEALT = ("--batch-size", "1", "--accumulation", "2", "--lora.dropout", "0.3", "--data.eval-size", "1")  # 8 rows
FSDP = ("--distributed", "fsdp")
DDP = ("--distributed", "ddp")
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw-8bit", "lion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def flags(folder):
    """The arguments of a training that leaves its run under a name."""
    model, data = tiny.checkpoint(folder / "model"), tiny.records(folder / "colours.jsonl", 9)

    def make(name, *more):
        return ["--model", str(model), "--data.path", str(data), "--out", str(folder / name), *SETTINGS.split(), *more]

    return make


def go_on(folder, name, *more):
    return ("resume", [str(folder / name), "--max-steps", "4", "--quiet", *more])


@pytest.fixture(scope="module")
def alone(folder, flags):
    """What one process makes."""
    short = ("--max-steps", "2")
    jobs = {
        "one": ("train", flags("one")),
        "one dealt": ("train", flags("one-dealt", *DEALT)),
        "one 8bit": ("train", flags("one-8bit", "--optimizer.name", "adamw-8bit")),
        "one to two": ("train", flags("one-to-two", *short)),
        "one to two 8bit": ("train", flags("one-to-two-8bit", *short, "--optimizer.name", "adamw-8bit")),
    }
    return dict(zip(jobs, commands(list(jobs.values())), strict=True))


@pytest.fixture(scope="module")
def token(folder):
    """One that only the last record has."""
    (found,) = models.load_tokenizer(folder / "model").encode("8")
    return found


@pytest.fixture(scope="module")
def both(folder, flags, alone, token):
    """What each of two processes makes, by rank."""
    short, held_out = ("--max-steps", "2"), ("--data.eval-size", "0")
    jobs = {
        "ddp": ("train", flags("ddp", *DDP), ("base kept",)),
        "fsdp": ("train", flags("fsdp", *FSDP), ("base kept",)),
        "ddp dealt": ("train", flags("ddp-dealt", *DDP, *DEALT)),
        "fsdp dealt": ("train", flags("fsdp-dealt", *FSDP, *DEALT)),
        "rank 1": ("train", flags("rank-1", *FSDP, "--lora.rank", "1")),
        "two to one": ("train", flags("two-to-one", *FSDP, *short)),
        "two to one 8bit": ("train", flags("two-to-one-8bit", *FSDP, *short, "--optimizer.name", "adamw-8bit")),
        "one to two": go_on(folder, "one-to-two", *FSDP),
        "one to two 8bit": go_on(folder, "one-to-two-8bit", *FSDP),
        "ddp to fsdp": ("train", flags("ddp-to-fsdp", *DDP, *short)),
        "ddp to fsdp on": go_on(folder, "ddp-to-fsdp", *FSDP),
        "signal": ("train", flags("signal", *FSDP), ("sigterm", 2)),
        "signal on": go_on(folder, "signal"),
        "request": ("train", flags("request", *DDP, "--save-steps", "0"), ("request", 2, folder / "request")),
        "poison": ("train", flags("poison", *FSDP, *held_out, "--no-dry-step"), ("poison", token)),
        "poison ddp": ("train", flags("poison-ddp", *DDP, *held_out, "--no-dry-step"), ("poison", token)),
        "other": ("train", flags("other"), ("another base", "model.layers.1.mlp.up_proj.weight")),
        "done": go_on(folder, "fsdp"),
    }
    for name in OPTIMIZERS:
        with_it = (*FSDP, *held_out, "--optimizer.name", name)
        jobs[f"whole {name}"] = ("train", flags(f"whole-{name}", *with_it))
        jobs[f"stopped {name}"] = ("train", flags(f"stopped-{name}", *with_it), ("sigterm", 2))
        jobs[f"stopped {name} on"] = go_on(folder, f"stopped-{name}")
    by_rank = together(commands, 2, list(jobs.values()), timeout=240)
    return [dict(zip(jobs, made, strict=True)) for made in by_rank]


@pytest.fixture(scope="module")
def main(both):
    return both[0]


def metrics(run: Path, split="train"):
    return [
        line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["split"] == split
    ]


def assert_alike(run: Path, other: Path, rel=1e-5, start=0):
    for split in ("train", "eval"):
        these, those = ([line for line in metrics(it, split) if line["step"] >= start] for it in (run, other))
        assert len(these) == len(those) > 0
        for line, expected in zip(these, those, strict=True):
            assert line == pytest.approx(expected, rel=rel)


def moments(run: Path, step=1):
    """The first moment of every gradient: after the first step, a tenth of the gradient as it was clipped."""
    states = load_file(run / "checkpoints" / f"step-{step:06d}" / "optimizer.safetensors")
    return {name: state for name, state in states.items() if name.endswith(".exp_avg")}


# One step and many


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_norms_and_tokens_of_one(folder, alone, main, way):
    assert main[way]["error"] is None
    assert_alike(folder / way, folder / "one")
    assert {line["grad_norm"] > 1 for line in metrics(folder / way)} == {True}, "clipping has to bite"
    assert len({line["tokens"] for line in metrics(folder / way)}) > 1, "steps have to differ"


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_have_the_gradients_of_one(folder, alone, main, way):
    ours, theirs = moments(folder / way), moments(folder / "one")
    assert ours.keys() == theirs.keys()
    norm = torch.cat([state.flatten() for state in theirs.values()]).norm()
    assert norm == pytest.approx(0.1 * 0.3, rel=1e-4)
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= 1e-5 * norm, name


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_dropout_is_that_of_one_process_where_micro_batches_are_dealt_whole(folder, alone, main, way):
    assert_alike(folder / f"{way}-dealt", folder / "one-dealt")
    without = [line["loss"] for line in metrics(folder / "one")]
    assert [line["loss"] for line in metrics(folder / f"{way}-dealt")] != without


def test_both_processes_say_the_same_of_a_run(both):
    for name in ("ddp", "fsdp"):
        one, two = (dict(made[name]["result"]) for made in both)
        for varies in ("seconds", "peak_memory"):
            one.pop(varies)
            two.pop(varies)
        assert one == two
    whole, share = (both[0][way]["result"]["optimizer"]["state_bytes"] for way in ("ddp", "fsdp"))
    assert share < whole


def test_only_the_main_process_writes(both):
    main, other = both
    assert len(main["fsdp"]["written"]) > 50
    assert {name: made["written"] for name, made in other.items() if made["written"]} == {}


def test_a_rank_may_have_no_rows_of_an_adapter(folder, main):
    assert main["rank 1"]["error"] is None
    losses = [line["loss"] for line in metrics(folder / "rank-1")]
    assert losses[-1] < losses[0]


def test_env_json_says_how_many_processes_there_were_and_in_which_way(folder, alone, main):
    told = {name: json.loads((folder / name / "env.json").read_text()) for name in ("one", "ddp", "fsdp")}
    assert [(env["processes"], env["distributed"]) for env in told.values()] == [(1, None), (2, "ddp"), (2, "fsdp")]


# Going on


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_go_on_bit_for_bit(folder, main, name):
    whole, stopped = folder / f"whole-{name}", folder / f"stopped-{name}"
    assert main[f"stopped {name}"]["exit"] == 143
    assert (whole / "metrics.jsonl").read_bytes() == (stopped / "metrics.jsonl").read_bytes()
    for path in ("adapter/adapter_model.safetensors", "checkpoints/step-000004/optimizer.safetensors"):
        assert (whole / path).read_bytes() == (stopped / path).read_bytes(), path
    assert (stopped / "STATUS").read_text() == "done\n"


def test_what_one_process_began_two_go_on_with_and_the_other_way_round(folder, alone, main):
    (back, coded) = commands([go_on(folder, "two-to-one"), go_on(folder, "two-to-one-8bit")])
    assert back["error"] is coded["error"] is None
    for name in ("one-to-two", "two-to-one", "ddp-to-fsdp"):
        assert (folder / name / "STATUS").read_text() == "done\n"
        assert_alike(folder / name, folder / "one", start=3)
    # 8-bit states lie in other blocks, and are rounded in others
    for name in ("one-to-two-8bit", "two-to-one-8bit"):
        assert_alike(folder / name, folder / "one-8bit", rel=2e-2, start=3)
    assert "processes was 2 and is 1" in (folder / "two-to-one" / "log.txt").read_text()


def test_the_file_of_states_is_that_of_one_process_but_for_blocks_of_eight_bits(folder, alone, main):
    one, two = (
        load_file(folder / name / "checkpoints" / "step-000002" / "optimizer.safetensors") for name in ("one", "fsdp")
    )
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in two.items()}
    assert (folder / "ddp-to-fsdp/checkpoints/step-000001/optimizer.safetensors").read_bytes()[8:50] == (
        folder / "one/checkpoints/step-000001/optimizer.safetensors"
    ).read_bytes()[8:50]


# Agreeing


def test_a_signal_to_one_process_stops_both_after_the_step_with_a_checkpoint(folder, both):
    assert [made["signal"]["exit"] for made in both] == [143, 143]
    assert both[0]["signal on"]["result"]["steps"] == 4
    assert_alike(folder / "signal", folder / "fsdp", rel=0)


def test_touching_save_is_seen_by_all(folder, main):
    assert [path.name for path in checkpoints(folder / "request" / "checkpoints")] == ["step-000004", "step-000002"]
    assert not (folder / "request" / "save").exists()


@pytest.mark.parametrize("way", ["poison", "poison ddp"])
def test_a_loss_that_is_no_number_in_one_process_stops_both_with_one_report(folder, both, way):
    one, two = (made[way]["error"] for made in both)
    assert one == two
    assert one.startswith("NonFiniteError: step ")
    assert "it begins in the output of the loss itself, on " in one
    run = folder / way.replace(" ", "-")
    (report,) = run.glob("nonfinite/*/report.json")
    told = json.loads(report.read_text())
    named = [where for batch in told["examples"] for where in batch]
    assert any(where.endswith(":9") for where in named)
    assert len(named) == len(set(named)), "each example is in one process's part"
    assert (run / "STATUS").read_text().startswith("failed: step ")


def test_processes_that_begin_with_other_weights_are_refused(both):
    said = {made["other"]["error"] for made in both}
    assert len(said) == 1
    assert "model.layers.1.mlp.up_proj.weight is not the same in process 0 and process 1" in said.pop()


def test_a_run_that_is_done_says_so(both):
    assert [made["done"]["result"]["status"] for made in both] == ["done", "done"]
