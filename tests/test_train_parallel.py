"""The same config means the same training on any number of processes: what two make is what one makes.

Everything that two processes do is done in one start of them, and everything that one does in this one.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import models
from models.readers import SafetensorsReader
from tests import tiny
from tests.processes import together
from tests.training import commands
from train.checkpoint import checkpoints

# 7 rows in micro-batches of two, three to a step: two whole ones and one that is cut, of two rows or of one; then a
# step of one micro-batch. The gradient's norm is far above the 0.3 at which it is clipped; blocks are recomputed.
SETTINGS = (
    "--max-steps 4 --batch-size 2 --accumulation 3 --keep-checkpoints 9 --lora.rank 3 --lora.dropout 0 "
    "--dtype float32 --device cpu --optimizer.learning-rate 5e-3 --data.eval-size 2 --quiet"
)
DEALT = ("--batch-size", "1", "--accumulation", "2", "--lora.dropout", "0.3", "--data.eval-size", "1")  # 8 rows
FSDP, DDP = ("--distributed", "fsdp"), ("--distributed", "ddp")
EVERY, SHORT, EIGHT = ("--save-steps", "1"), ("--max-steps", "2"), ("--optimizer.name", "adamw-8bit")
OPTIMIZERS = ("paged-adamw-8bit", "lion")


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
    jobs = {
        "one": ("train", flags("one", *EVERY)),
        "one dealt": ("train", flags("one-dealt", *DEALT)),
        "one 8bit": ("train", flags("one-8bit", *EIGHT)),
        "one ia3": ("train", flags("one-ia3", *SHORT, "--method", "ia3")),
        "one bitfit": ("train", flags("one-bitfit", *SHORT, "--method", "bitfit")),
        "one to two": ("train", flags("one-to-two", *SHORT)),
        "one to two 8bit": ("train", flags("one-to-two-8bit", *SHORT, *EIGHT)),
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
    nothing = ("--data.eval-size", "0")
    jobs = {
        "ddp": ("train", flags("ddp", *DDP, *EVERY), ("base kept",)),
        "fsdp": ("train", flags("fsdp", *FSDP, *EVERY), ("base kept",)),
        "ddp dealt": ("train", flags("ddp-dealt", *DDP, *DEALT)),
        "fsdp dealt": ("train", flags("fsdp-dealt", *FSDP, *DEALT)),
        "rank 1": ("train", flags("rank-1", *FSDP, "--lora.rank", "1")),
        "two": ("train", flags("two", *FSDP, *SHORT)),
        "two 8bit": ("train", flags("two-8bit", *FSDP, *SHORT, *EIGHT)),
        "one to two": go_on(folder, "one-to-two", *FSDP),
        "one to two 8bit": go_on(folder, "one-to-two-8bit", *FSDP),
        "ia3": ("train", flags("two-ia3", *FSDP, *SHORT, "--method", "ia3")),
        "bitfit": ("train", flags("two-bitfit", *DDP, *SHORT, "--method", "bitfit")),
        "prefix": ("train", flags("two-prefix", *FSDP, *SHORT, "--method", "prefix")),
        "ddp to fsdp": ("train", flags("ddp-to-fsdp", *DDP, *SHORT)),
        "ddp to fsdp on": go_on(folder, "ddp-to-fsdp", *FSDP),
        "signal": ("train", flags("signal", *FSDP), ("sigterm", 2)),
        "signal on": go_on(folder, "signal"),
        "request": ("train", flags("request", *DDP), ("request", 2, folder / "request")),
        "poison": ("train", flags("poison", *FSDP, *nothing, "--no-dry-step"), ("poison", token)),
        "poison ddp": ("train", flags("poison-ddp", *DDP, *nothing, "--no-dry-step"), ("poison", token)),
        "other": ("train", flags("other"), ("another base", "model.layers.1.mlp.up_proj.weight")),
        "unreached": ("train", flags("unreached", *DDP), ("unreached",)),
        "done": go_on(folder, "fsdp"),
        "there": ("train", flags("fsdp", *FSDP)),
    }
    for name in OPTIMIZERS:
        with_it = (*FSDP, *nothing, "--optimizer.name", name)
        jobs[f"whole {name}"] = ("train", flags(f"whole-{name}", *with_it))
        jobs[f"stopped {name}"] = ("train", flags(f"stopped-{name}", *with_it), ("sigterm", 2))
        jobs[f"stopped {name} on"] = go_on(folder, f"stopped-{name}")
    by_rank = together(commands, 2, list(jobs.values()), timeout=240)
    for name in ("two", "two-8bit"):
        for other in ("one", "three"):
            shutil.copytree(folder / name, folder / f"{name}-to-{other}")
    return [dict(zip(jobs, made, strict=True)) for made in by_rank]


@pytest.fixture(scope="module")
def three(folder, both):
    """What each of three processes makes of what two began."""
    return together(commands, 3, [go_on(folder, "two-to-three"), go_on(folder, "two-8bit-to-three")], timeout=240)


@pytest.fixture(scope="module")
def main(both):
    return both[0]


def metrics(run: Path, split="train"):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.pop("split") == split]


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


@pytest.mark.parametrize("method", ["ia3", "bitfit"])
def test_vectors_and_biases_are_learned_by_two_as_by_one(folder, alone, main, method):
    assert main[method]["error"] is None
    assert_alike(folder / f"two-{method}", folder / f"one-{method}")
    these, those = (
        load_file(folder / f"{n}-{method}" / "adapter" / "adapter_model.safetensors") for n in ("two", "one")
    )
    assert these.keys() == those.keys()
    for name, expected in those.items():
        torch.testing.assert_close(these[name], expected, atol=1e-5, rtol=1e-4)


def test_a_prefix_of_a_shared_model_is_refused(main):
    assert "a prefix needs the whole model" in main["prefix"]["error"]


def test_both_processes_say_the_same_of_a_run(both):
    for name in ("ddp", "fsdp"):
        one, two = (dict(made[name]["result"]) for made in both)
        for varies in ("seconds", "peak_memory"):
            one.pop(varies)
            two.pop(varies)
        assert one == two


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


SAME = ("metrics.jsonl", "adapter/adapter_model.safetensors", "checkpoints/step-000004/optimizer.safetensors")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_go_on_bit_for_bit(folder, main, name):
    assert main[f"stopped {name}"]["exit"] == 143
    assert_same(folder / f"whole-{name}", folder / f"stopped-{name}")


def test_a_signal_to_one_process_stops_both_after_the_step_with_a_checkpoint(folder, both):
    assert [made["signal"]["exit"] for made in both] == [143, 143]
    assert [path.name for path in checkpoints(folder / "signal" / "checkpoints")] == ["step-000004", "step-000002"]
    assert_same(folder / "fsdp", folder / "signal")


def assert_same(run, other):
    for path in SAME:
        assert (run / path).read_bytes() == (other / path).read_bytes(), path
    assert (other / "STATUS").read_text() == "done\n"


def test_two_processes_go_on_with_what_one_began(folder, alone, both):
    assert [made["one to two"]["error"] for made in both] == [None, None]
    assert_alike(folder / "one-to-two", folder / "one", start=3)
    assert_alike(folder / "ddp-to-fsdp", folder / "one", start=3)
    # 8-bit states lie in other blocks, and are rounded in others
    assert_alike(folder / "one-to-two-8bit", folder / "one-8bit", rel=1e-2, start=3)


def test_one_process_goes_on_with_what_two_began(folder, alone, both):
    made = commands([go_on(folder, "two-to-one"), go_on(folder, "two-8bit-to-one")])
    assert [one["error"] for one in made] == [None, None]
    assert_alike(folder / "two-to-one", folder / "one", start=3)
    assert_alike(folder / "two-8bit-to-one", folder / "one-8bit", rel=1e-2, start=3)
    assert "processes was 2 and is 1" in (folder / "two-to-one" / "log.txt").read_text()


def test_three_processes_go_on_with_what_two_began(folder, alone, three):
    assert [one["error"] for made in three for one in made] == [None] * 6
    assert_alike(folder / "two-to-three", folder / "one", start=3)
    assert_alike(folder / "two-8bit-to-three", folder / "one-8bit", rel=1e-2, start=3)


def test_the_file_of_states_is_that_of_one_process(folder, alone, main):
    one, two = (load_file(folder / name / "checkpoints/step-000004/optimizer.safetensors") for name in ("one", "fsdp"))
    assert {name: (t.shape, t.dtype) for name, t in one.items()} == {
        name: (t.shape, t.dtype) for name, t in two.items()
    }
    told = {
        name: SafetensorsReader(folder / name / "checkpoints/step-000004/optimizer.safetensors").metadata
        for name in ("one", "ddp", "fsdp")
    }
    assert told == {"one": {"format": "pt"}, "ddp": {"format": "pt"}, "fsdp": {"shards": "2"}}


# Agreeing


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


def test_a_parameter_that_the_loss_does_not_reach_is_named(both):
    said = {made["unreached"]["error"] for made in both}
    assert len(said) == 1
    assert "trainable parameters got no gradient: model.idle; the loss does not depend on them" in said.pop()


def test_processes_that_begin_with_other_weights_are_refused(both):
    said = {made["other"]["error"] for made in both}
    assert len(said) == 1
    assert "model.layers.1.mlp.up_proj.weight is not the same in process 0 and process 1" in said.pop()


def test_a_run_that_is_done_says_so_and_one_that_is_there_is_refused_by_both(both):
    assert [made["done"]["result"]["status"] for made in both] == ["done", "done"]
    said = {made["there"]["error"] for made in both}
    assert len(said) == 1
    assert "is not empty" in said.pop()
