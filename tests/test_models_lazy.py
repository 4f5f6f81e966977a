"""A model that is read layer by layer answers as one that is loaded, and holds one layer at a time."""

import pytest
import torch

import models
import nf4
from models.lazy import load_lazily
from models.linear import Linear
from tests.golden import GOLDEN

BASE = GOLDEN / "llama-gqa"
TIED = GOLDEN / "llama3-rope-tied"
BIASED = GOLDEN / "llama-headdim-bias"


@pytest.mark.parametrize("source", [BASE, TIED, BIASED])
def test_a_model_read_lazily_answers_alike_and_keeps_no_layer(source):
    lazy, ids = load_lazily(source, torch.float32), torch.arange(24).view(2, 12)
    assert torch.equal(lazy(ids), models.load(source, dtype=torch.float32)(ids))
    layers = [m for m in lazy.modules() if isinstance(m, Linear)]
    assert len(layers) == 14
    assert all(layer.weight.is_meta for layer in layers)


def test_a_layer_read_lazily_is_the_only_one_in_memory():
    lazy, present = load_lazily(BASE, torch.float32), []
    layers = [m for m in lazy.modules() if isinstance(m, Linear)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: present.append(sum(not m.weight.is_meta for m in layers)))
    lazy(torch.arange(5)[None])
    assert present == [1] * 14


def test_a_quantized_checkpoint_is_not_read_lazily(tmp_path):
    models.save(models.load(BASE, nf4.QuantConfig()), tmp_path / "q")
    with pytest.raises(models.CheckpointError, match="is quantized"):
        load_lazily(tmp_path / "q")
