"""A checkpoint is there whole or not at all: what is torn or altered is found, and what is good is never lost."""

import errno
import json
import os
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.errors import CheckpointError, ConfigError, NonFiniteError, WriteError
from train.checkpoint import checkpoints, newest_checkpoint, problem, prune, write_checkpoint
from train.loop import LoopConfig
from train.optimizer import NAMES, OptimizerConfig, make_optimizer
from train.optimizer_file import collect_states, restore_states, save_states
from train.passes import Passes
from train.run import Run
from train.snapshot import newest_snapshot, read_snapshot, save_snapshot
from train.state import LoopState

WEIGHTS = bytes(range(256)) * 9


def fill(directory):
    (directory / "state.json").write_text('{"some": "state"}')
    (directory / "weights").write_bytes(WEIGHTS)


def written(folder, *steps, keep=3):
    for step in steps:
        write_checkpoint(folder, step, fill, keep)
    return folder


def names(folder):
    return [path.name for path in checkpoints(folder)]


def newest(folder):
    """Its name, and what was told on the way."""
    told = []
    found = newest_checkpoint(folder, told.append)
    return found and found.name, told


# Written


def test_a_checkpoint_has_its_files_a_manifest_of_them_and_is_named_by_latest(tmp_path):
    written(tmp_path, 250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000250"]
    assert (tmp_path / "latest").read_text() == "step-000250\n"
    listed = json.loads((tmp_path / "step-000250" / "MANIFEST.json").read_text())["files"]
    assert [(f["name"], f["bytes"]) for f in listed] == [("state.json", 17), ("weights", 2304)]
    assert [f["sha256"] for f in listed] == [sha256(b'{"some": "state"}').hexdigest(), sha256(WEIGHTS).hexdigest()]
    assert problem(tmp_path / "step-000250") is None


def test_only_the_last_ones_stay(tmp_path):
    assert names(written(tmp_path, 1, 2, 10, 1_000_000, keep=2)) == ["step-1000000", "step-000010"]


def test_a_step_that_has_a_good_checkpoint_keeps_it_and_one_that_has_a_torn_one_gets_another(tmp_path):
    written(tmp_path, 1)
    place = tmp_path / "step-000001"
    write_checkpoint(tmp_path, 1, lambda directory: pytest.fail("it is there"), 3)
    (place / "weights").write_bytes(b"torn")
    written(tmp_path, 1)
    assert problem(place) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000001"]


def test_what_killed_writers_have_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".tmp-step-000003").mkdir(parents=True)
    (tmp_path / ".tmp-step-000003" / "weights").touch()
    (tmp_path / ".tmp-gone-step-000001").mkdir()
    (tmp_path / ".latest.77.tmp").touch()
    written(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000004"]


# Torn and altered


def cut(place):
    (place / "weights").write_bytes((place / "weights").read_bytes()[:-1])


def flip(place):
    content = bytearray((place / "weights").read_bytes())
    content[1000] ^= 1
    (place / "weights").write_bytes(content)


def relist(place):
    """A manifest that leaves out what was altered."""
    manifest = json.loads((place / "MANIFEST.json").read_text())
    manifest["files"] = [f for f in manifest["files"] if f["name"] != "state.json"]
    (place / "MANIFEST.json").write_text(json.dumps(manifest))


def outside(place):
    (place / "MANIFEST.json").write_text('{"files": [{"name": "../latest", "bytes": 12, "sha256": ""}]}')


HARM = {
    "a file cut short": (cut, "weights has 2303 bytes, and MANIFEST.json says 2304"),
    "one bit": (flip, "weights has another sha256 than MANIFEST.json says"),
    "a file gone": (lambda place: (place / "weights").unlink(), "it lacks weights"),
    "a directory for a file": (lambda place: ((place / "weights").unlink(), (place / "weights").mkdir()), "it lacks"),
    "no manifest": (lambda place: (place / "MANIFEST.json").unlink(), "it lacks MANIFEST.json, which is written last"),
    "half a manifest": (lambda place: (place / "MANIFEST.json").write_text('{"fil'), "MANIFEST.json cannot be read"),
    "no text": (lambda place: (place / "MANIFEST.json").write_bytes(b"\xff\xfe"), "MANIFEST.json cannot be read"),
    "an empty manifest": (lambda place: (place / "MANIFEST.json").write_text(""), "MANIFEST.json cannot be read"),
    "another manifest": (lambda place: (place / "MANIFEST.json").write_text("[1]"), "MANIFEST.json cannot be read"),
    "a shorter list": (relist, "does not list the files of a checkpoint"),
    "a path": (outside, "does not list the files of a checkpoint"),
    "nothing at all": (lambda place: [p.unlink() for p in place.iterdir()], "it lacks MANIFEST.json"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_harmed_checkpoint_is_told_of_and_the_one_before_is_used(tmp_path, harm):
    do, says = HARM[harm]
    written(tmp_path, 2, 4, 6)
    do(tmp_path / "step-000006")
    found, told = newest(tmp_path)
    assert found == "step-000004"
    assert len(told) == 1
    assert told[0].startswith(f"{tmp_path / 'step-000006'} is not used: ")
    assert says in told[0]
    assert "\n" not in told[0]


def test_latest_is_not_believed(tmp_path):
    written(tmp_path, 2, 4)
    for lie in ("step-000009\n", "step-000002\n", "../..\n", ""):
        (tmp_path / "latest").write_text(lie)
        assert newest(tmp_path) == ("step-000004", [])
    (tmp_path / "latest").unlink()
    assert newest(tmp_path) == ("step-000004", [])


def test_without_any_checkpoint_there_is_none_and_without_any_whole_one_that_is_an_error(tmp_path):
    assert newest(tmp_path / "nowhere") == (None, [])
    assert newest(tmp_path) == (None, [])
    written(tmp_path, 2, 4)
    cut(tmp_path / "step-000002")
    flip(tmp_path / "step-000004")
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints is whole, so there is nothing to go on from"):
        newest_checkpoint(tmp_path, lambda text: None)


@pytest.mark.parametrize("harm", [cut, flip])
def test_the_only_good_checkpoint_is_never_removed(tmp_path, harm):
    written(tmp_path, 1, 2, 3)
    harm(tmp_path / "step-000002")
    harm(tmp_path / "step-000003")
    prune(tmp_path, 1)
    assert names(tmp_path) == ["step-000003", "step-000002", "step-000001"]
    written(tmp_path, 4, keep=2)
    assert [name for name in names(tmp_path) if problem(tmp_path / name) is None] == ["step-000004", "step-000001"]


# Disks that are full


class Operations:
    """Lets so many operations on files pass and refuses all that follow, as a full disk does."""

    def __init__(self, monkeypatch, code):
        self.left, self.code, self.count = 10**9, code, 0
        for name in ("fsync", "replace", "rename"):
            monkeypatch.setattr(os, name, self.counting(getattr(os, name)))

    def counting(self, operation):
        def counted(*arguments):
            self.count += 1
            if self.count > self.left:
                raise OSError(self.code, os.strerror(self.code))
            return operation(*arguments)

        return counted


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_failure_at_any_operation_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, code):
    disk = Operations(monkeypatch, code)
    written(tmp_path / "measured", 1)
    operations = disk.count
    assert operations >= 8
    for left in range(operations):
        folder = tmp_path / str(left)
        disk.left = 10**9
        written(folder, 1, keep=1)
        disk.count, disk.left = 0, left
        with pytest.raises(OSError, match=os.strerror(code)):
            written(folder, 2, keep=1)
        disk.left = 10**9
        assert not list(folder.glob(".tmp*"))
        assert newest(folder)[0] in ("step-000001", "step-000002")
        assert newest(folder)[1] == []
        written(folder, 3, keep=1)
        assert names(folder) == ["step-000003"]


# What is in one


class Adapter(nn.Module):
    """Two matrices with the names that adapters have."""

    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in ("lora_A", "lora_B")})


def save(model, directory):
    torch.save(model.state_dict(), directory / "weights.pt")


def restore(model, directory):
    model.load_state_dict(torch.load(directory / "weights.pt", weights_only=True))


def trained(name="adamw", steps=2, seed=0, ratio=1.0):
    """A model, ready for passes, and its optimizer after some steps."""
    torch.manual_seed(seed)
    passes = Passes(Adapter())
    settings: Any = {"name": name, "learning_rate": 0.01, "lora_plus_ratio": ratio}
    optimizer = make_optimizer(passes.moved, OptimizerConfig(**settings))
    for _ in range(steps):
        move(passes, optimizer)
    return passes, optimizer


def move(passes, optimizer):
    for parameter in passes.moved.values():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()


@pytest.mark.parametrize("ratio", [1.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_states_come_back_under_their_parameters_names_and_go_on_alike(tmp_path, name, ratio):
    passes, optimizer = trained(name, ratio=ratio)
    states = collect_states(optimizer, passes)
    save_states(states, tmp_path)
    assert json.loads(json.dumps(states.groups))[0]["params"][0] == "layer.lora_A.weight"
    other, fresh = trained(name, steps=0, seed=1, ratio=ratio)
    other.model.load_state_dict(passes.model.state_dict())
    restore_states(fresh, other, tmp_path, json.loads(json.dumps(states.groups)))
    for these, those in ((passes, optimizer), (other, fresh)):
        torch.manual_seed(5)
        move(these, those)
    for key, value in passes.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[key], value)
    assert optimizer.param_groups[0]["lr"] == fresh.param_groups[0]["lr"]


def test_states_of_another_optimizer_or_of_other_parameters_are_refused(tmp_path):
    passes, optimizer = trained()
    states = collect_states(optimizer, passes)
    save_states(states, tmp_path)
    its, lion = trained("lion", steps=0)
    with pytest.raises(CheckpointError, match=r"is not of this optimizer: .*Lion keeps exp_avg"):
        restore_states(lion, its, tmp_path, states.groups)
    its, plus = trained(steps=0, ratio=2.0)
    with pytest.raises(CheckpointError, match="the optimizer's parameters are not those of this training"):
        restore_states(plus, its, tmp_path, states.groups)


@pytest.fixture
def run(tmp_path):
    with Run.create(tmp_path / "run", LoopConfig(max_steps=9), data={"d.jsonl": "00"}, base={"m.bin": "11"}) as run:
        yield run


def saved(run, step, parts=None, keep=3):
    passes, optimizer = parts or trained()
    state = LoopState(step=step, epoch=1, batch=2, tokens=3, evaluated=0)
    return save_snapshot(run, passes, optimizer, state, total=9, keep=keep, save=save)


def test_a_snapshot_says_how_far_everything_was_and_where_it_came_from(run):
    run.metrics(1, "train", loss=0.5)
    found = read_snapshot(saved(run, 5))
    assert found.state == LoopState(step=5, epoch=1, batch=2, tokens=3, evaluated=0)
    assert found.total == 9
    assert found.journals == {"metrics.jsonl": (run.directory / "metrics.jsonl").stat().st_size, "timing.jsonl": 0}
    assert found.origin["data"] == {"d.jsonl": "00"}
    assert found.origin["base"] == {"m.bin": "11"}
    assert found.origin["config"]["max_steps"] == 9
    passes, optimizer = trained(steps=0, seed=3)
    state = found.restore(passes, optimizer, restore)
    assert state.step == 5
    assert torch.equal(passes.moved["layer.lora_B.weight"], trained()[0].moved["layer.lora_B.weight"])


def test_journals_are_cut_back_to_the_snapshot_and_one_that_lost_lines_is_refused(run):
    run.metrics(1, "train", loss=0.5)
    found = read_snapshot(saved(run, 1))
    kept = (run.directory / "metrics.jsonl").read_bytes()
    run.metrics(2, "train", loss=0.25)
    run.append("eval/samples.jsonl", step=2, text="never was")
    with open(run.directory / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "spl')
    assert run.cut_journals(found.journals) == {"metrics.jsonl": 1, "eval/samples.jsonl": 1}
    assert (run.directory / "metrics.jsonl").read_bytes() == kept
    assert (run.directory / "eval/samples.jsonl").read_bytes() == b""
    (run.directory / "metrics.jsonl").write_bytes(kept[:-3])
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl has \d+ bytes and had \d+ when the checkpoint was made"):
        run.cut_journals(found.journals)


def test_a_snapshot_of_another_format_is_refused(run):
    place = saved(run, 5)
    content = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps(content | {"format": 7}))
    with pytest.raises(CheckpointError, match="is of format 7; this version reads format 1"):
        read_snapshot(place)
    (place / "state.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(CheckpointError, match="is not the state of a run"):
        read_snapshot(place)


def test_an_adapter_that_has_learned_nothing_is_not_saved(run):
    parts = trained()
    nn.init.zeros_(parts[0].moved["layer.lora_B.weight"])
    with pytest.raises(ConfigError, match="after 1 steps every lora_B is still zero: the adapter has learned nothing"):
        saved(run, 1, parts)
    saved(run, 0, parts)  # before the first step that is as it should be


def test_numbers_that_are_none_are_not_saved(run):
    parts = trained()
    parts[0].moved["layer.lora_A.weight"].data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 1: layer\.lora_A\.weight holds NaN or infinity \(1 of 2"):
        saved(run, 1, parts)
    assert newest_snapshot(run, print) is None
    parts = trained()
    parts[1].state[parts[0].moved["layer.lora_A.weight"]]["exp_avg"][0, 0] = float("inf")
    with pytest.raises(RuntimeError, match=r"the optimizer's layer\.lora_A\.weight\.exp_avg holds NaN or infinity"):
        saved(run, 1, parts)
    assert names(run.checkpoints) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_with_the_checkpoint_that_is_good_and_how_to_go_on(run, monkeypatch, code):
    disk = Operations(monkeypatch, code)
    disk.left = 0
    with pytest.raises(WriteError, match=r"step 1 could not be written: .*There is no checkpoint yet; make room"):
        saved(run, 1)
    disk.left = 10**9
    saved(run, 2)
    disk.left = disk.count + 2
    with pytest.raises(WriteError) as caught:
        saved(run, 4)
    assert caught.value.exit_code == 7
    assert str(caught.value).startswith(f"the checkpoint of step 4 could not be written: [Errno {code}] ")
    good = run.checkpoints / "step-000002"
    assert str(caught.value).endswith(
        f"The last good checkpoint is {good}; make room, then go on: qlora resume {run.directory}"
    )
    assert problem(good) is None


def test_what_differs_after_writing_is_found(run, monkeypatch):
    import train.optimizer_file

    def careless(tensors, path, metadata):
        real({name: t + 1 for name, t in tensors.items()}, path, metadata)

    real = train.optimizer_file.save_file
    monkeypatch.setattr(train.optimizer_file, "save_file", careless)
    with pytest.raises(RuntimeError, match="differs after writing; the disk may be failing"):
        saved(run, 1)
    assert list(run.checkpoints.iterdir()) == []


def test_a_copied_run_directory_goes_on_from_its_own_checkpoints(run, tmp_path):
    saved(run, 2)
    shutil.copytree(run.directory, tmp_path / "copy")
    found = newest_snapshot(Run(tmp_path / "copy"), print)
    assert found is not None
    assert found.directory == Path(tmp_path / "copy" / "checkpoints" / "step-000002")
    assert replace(found, directory=run.checkpoints) == replace(
        read_snapshot(run.checkpoints / "step-000002"), directory=run.checkpoints
    )
