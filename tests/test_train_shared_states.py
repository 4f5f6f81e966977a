"""Optimizer states that lie on several processes, in the file of one: which bytes are whose, and what is decoded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from models.errors import CheckpointError
from models.parallel import shares, world
from models.readers import SafetensorsReader
from nf4 import dequantize_dynamic, quantize_dynamic
from train.shared_states import Cut, own_states

shapes = st.sampled_from([(5, 200), (1, 700), (7,), (513,), (3, 0), (4, 256), (2, 3, 50)])
sizes = st.integers(1, 5)


@given(shape=shapes, shards=sizes)
def test_a_cut_has_every_number_and_every_block_once(shape, shards):
    cut = Cut(shape, shards)
    for part in (lambda shard: cut.numbers(cut.rows(shard)), cut.blocks):
        found = [place for shard in range(shards) for place in part(shard)]
        assert found == list(range(len(found)))
    assert sum(len(cut.numbers(cut.rows(shard))) for shard in range(shards)) == torch.Size(shape).numel()
    for shard in range(shards):
        assert len(cut.blocks(shard)) == -(-len(cut.numbers(cut.rows(shard))) // 256)


def written(path, shape, shards):
    """States as so many processes would have them, in one file, and the values that they stand for."""
    torch.manual_seed(shards)
    values = torch.randn(shape).abs() * 10 ** torch.randn(shape)
    parts = [
        values[cut_rows.start : cut_rows.stop].flatten() for cut_rows in map(Cut(shape, shards).rows, range(shards))
    ]
    tensors = {"w.step": torch.tensor(3.0), "w.moment": values}
    decoded = {}
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        coded = [quantize_dynamic(part, 256, signed) for part in parts]
        tensors[f"w.{key}"] = torch.cat([codes for codes, _ in coded]).view(shape)
        tensors[f"w.{key}_absmax"] = torch.cat([absmax for codes, absmax in coded if len(codes)])
        decoded[key] = torch.cat([dequantize_dynamic(*it, 256, signed) for it in coded]).view(shape)
    save_file(tensors, path)
    return tensors, decoded


KEYS = ("step", "moment", "exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")


def read(monkeypatch, path, shape, shards, rank, size):
    monkeypatch.setattr(world, "rank", lambda: rank)
    monkeypatch.setattr(world, "size", lambda: size)
    monkeypatch.setattr(shares, "is_shared", lambda tensor: size > 1)
    return own_states(SafetensorsReader(path), "w", KEYS, torch.empty(shape), shards)


@pytest.mark.parametrize("shape", [(5, 200), (1, 700), (513,), (7, 3, 50)])
@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_process_gets_the_states_of_its_rows(monkeypatch, tmp_path, shape, shards, size):
    tensors, decoded = written(tmp_path / "states.safetensors", shape, shards)
    exact = 0
    for rank in range(size):
        found = read(monkeypatch, tmp_path / "states.safetensors", shape, shards, rank, size)
        rows = Cut(shape, size).rows(rank)
        assert found["step"] == 3
        assert torch.equal(found["moment"], tensors["w.moment"][rows.start : rows.stop])
        for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            expected = decoded[key][rows.start : rows.stop]
            assert found[key].shape == expected.shape
            if f"{key}_absmax" in found:
                exact += 1
                mine = dequantize_dynamic(found[key].flatten(), found[f"{key}_absmax"], 256, signed)
                assert torch.equal(mine.view(expected.shape), expected)
            else:
                assert torch.equal(found[key], expected)
    if shards == size:
        assert exact == 2 * size, "on as many processes nothing is decoded"


def test_a_file_of_another_shape_is_refused(monkeypatch, tmp_path):
    written(tmp_path / "states.safetensors", (5, 200), 2)
    with pytest.raises(CheckpointError, match=r"w\.moment is \[5, 200\], expected \[6, 200\]"):
        read(monkeypatch, tmp_path / "states.safetensors", (6, 200), 2, 0, 2)
    with pytest.raises(CheckpointError, match=r"w\.exp_avg_absmax is \[5\], expected \[4\]"):
        read(monkeypatch, tmp_path / "states.safetensors", (5, 200), 1, 0, 2)
