"""Blocks computed again in backward: the same gradients, without the product that nothing asks for."""

from collections import Counter

import pytest
import torch

from kernels import ops
from models import LoraConfig, attach_lora, load
from models.recompute import again, last_product, recomputed, state
from nf4 import QuantConfig
from tests.judge import poisoned_memory
from tests.tiny import checkpoint

LINEARS, LAYERS = 7, 2


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("model") / "model")


def gradients(path, checkpointing, rank, monkeypatch, dora=False):
    """Gradients of one step with dropout, and how often a product of a stored weight was made."""
    model = load(path, quant=QuantConfig(), dtype=torch.float32)
    torch.manual_seed(1)
    if rank:
        attach_lora(model, LoraConfig(rank=rank, dropout=0.3, dora=dora))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
    else:
        model.get_submodule("model.norm").requires_grad_(True)
    model.train()
    model.gradient_checkpointing = checkpointing
    made = Counter()
    form = ops.form
    monkeypatch.setattr(ops, "form", lambda operator, *rest: made.update([operator]) or form(operator, *rest))
    ids = torch.arange(12).view(2, 6) + 5
    with poisoned_memory():
        model.loss(input_ids=ids, labels=ids).backward()
    monkeypatch.undo()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, made["matmul"]


@pytest.mark.parametrize("rank", [0, 3])
def test_gradients_are_the_same_and_the_last_product_is_made_once(path, rank, monkeypatch):
    plain, once = gradients(path, False, rank, monkeypatch)
    checkpointed, twice = gradients(path, True, rank, monkeypatch)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert gradient.isfinite().all()
        assert torch.equal(gradient, checkpointed[name]), name
    assert once == LINEARS * LAYERS
    assert twice == once + (LINEARS - 1) * LAYERS


def test_a_dora_layer_that_ends_a_block_has_its_product_in_the_second_round_too(path, monkeypatch):
    """The magnitude's gradient is made of it. Each layer makes a second product, for the lengths of its rows."""
    plain, once = gradients(path, False, 3, monkeypatch, dora=True)
    checkpointed, twice = gradients(path, True, 3, monkeypatch, dora=True)
    assert sum("magnitude" in name for name in plain) == LINEARS * LAYERS
    for name, gradient in plain.items():
        assert gradient.isfinite().all()
        assert torch.equal(gradient, checkpointed[name]), name
    assert once == 2 * LINEARS * LAYERS
    assert twice == 2 * once


def test_only_the_second_round_is_told_apart_and_only_until_it_ends():
    seen = []

    def block(x):
        with last_product():
            seen.append(ops.values.needed)
        return x.sin().sin()

    x = torch.ones(2, requires_grad=True)
    recomputed(block, x).sum().backward()
    assert seen == [True, False]
    assert not state.again
    assert ops.values.needed


def test_an_error_in_the_second_round_does_not_leave_the_flag_set():
    with pytest.raises(KeyError), again(), last_product():
        raise KeyError
    assert not state.again
    assert ops.values.needed
