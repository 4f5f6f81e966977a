"""The two contestants are the same model, and what is measured of them is what was asked for."""

import dataclasses
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import training
from benchmarks.roofline import Limits
from benchmarks.timing import Timing
from benchmarks.training import TINY, Setting, Stepper
from models import recompute

SETTING = Setting(config=TINY, batch=2, tokens=24, rank=4, dropout=0.0)


@pytest.fixture(scope="module")
def peer():
    pytest.importorskip("bitsandbytes")
    return Stepper(training.peer(SETTING), SETTING)


@pytest.fixture(scope="module")
def ours():
    return Stepper(training.ours(SETTING), SETTING)


def test_the_peer_gives_the_loss_and_the_gradients_that_we_give(ours, peer):
    assert ours.passes.moved.keys() == peer.passes.moved.keys()
    losses = [step.loss() for step in (ours, peer)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-3)
    for loss in losses:
        loss.backward()
    for name, parameter in ours.passes.moved.items():
        theirs = peer.passes.moved[name].grad
        assert torch.equal(parameter, peer.passes.moved[name])
        assert (parameter.grad - theirs).norm() < 0.03 * theirs.norm(), name
        assert theirs.norm() > 0
    for step in (ours, peer):
        step.optimizer.zero_grad()


def test_both_store_the_same_codes(ours, peer):
    for name, layer in ours.model.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(layer.weight.view(-1), peer.model.get_submodule(name).weight.view(-1)), name


def test_dropout_reaches_every_adapter(ours, peer):
    for step in (ours, peer):
        plain = step.loss().item()
        assert step.loss().item() == plain
        step.set_dropout(0.5)
        assert step.loss().item() != plain
        step.set_dropout(0.0)
        assert step.loss().item() == plain


def test_a_step_moves_the_adapters_and_lowers_the_loss():
    step = Stepper(training.ours(SETTING), SETTING)
    losses = [step() for _ in range(12)]
    assert losses[-1] < losses[0] - 0.01


def test_blocks_are_checkpointed_in_both(ours, peer, monkeypatch):
    for step, module in ((ours, recompute), (peer, sys.modules[type(peer.model).__module__])):
        blocks = []
        monkeypatch.setattr(
            module, "checkpoint", lambda block, *a, blocks=blocks, **k: blocks.append(block) or block(*a)
        )
        step.loss()
        assert blocks == list(step.model.model.layers)


def test_each_row_is_timed_with_its_own_dropout(monkeypatch):
    seen = []

    def timed(steps, repeats, seconds):
        found = [{layer.dropout for layer in s.model.modules() if hasattr(layer, "lora_A")} for s in steps.values()]
        seen.append(found)
        return {name: Timing(1.0, 1.0, 1.0, repeats) for name in steps}

    monkeypatch.setattr(training, "interleaved", timed)
    monkeypatch.setattr(training, "peak_of", lambda name, setting: (100, 300))
    rows = training.measure(SETTING, dropouts=(0.0, 0.2), repeats=1)
    contestants = len(seen[0])
    assert seen == [[{0.0}] * contestants, [{0.2}] * contestants]
    assert rows[0]["ours_tokens_s"] == SETTING.batch * SETTING.tokens


def test_rows_have_speed_and_memory_of_each_dropout(monkeypatch):
    pytest.importorskip("bitsandbytes")
    asked = []
    monkeypatch.setattr(training, "peak_of", lambda name, setting: asked.append((name, setting.dropout)) or (100, 300))
    rows = training.measure(SETTING, dropouts=(0.0, 0.2), repeats=1)
    assert asked == [(name, dropout) for dropout in (0.0, 0.2) for name in ("ours", "peer", "dense")]
    assert [row["dropout"] for row in rows] == [0.0, 0.2]
    for row in rows:
        assert row["speed_ratio"] == row["ours_tokens_s"] / row["peer_tokens_s"] > 0
        assert (row["peak_ratio"], row["peak_above_start_ratio"]) == (1, 1)


def test_the_peak_is_that_of_a_process_of_its_own():
    above, whole = training.peak_of("ours", SETTING)
    assert 0 <= above < 2**26  # what torch loads at its first step, over 2**27, is not counted
    assert 2**27 < whole < 2**33
    wide = dataclasses.replace(SETTING, config=dataclasses.replace(TINY, vocab_size=300_000))
    assert training.peak_of("ours", wide)[0] > 2 * 64 * 300_000  # the embedding alone, in bfloat16


def test_operations_are_those_of_the_products_that_a_step_makes():
    """Counted by torch as they are made, but for attention and the head, which are ours and which it does not see."""
    step = Stepper(training.dense(SETTING), SETTING)
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    counted = sum(n for operator, n in counter.get_flop_counts()["Global"].items() if "mm" in str(operator))
    D, heads, kv = TINY.hidden_size, TINY.num_attention_heads * TINY.head_dim, TINY.num_key_value_heads * TINY.head_dim
    tokens = SETTING.batch * SETTING.tokens
    attention = 8 * heads * SETTING.tokens * TINY.num_hidden_layers * tokens
    head = 4 * TINY.vocab_size * D * tokens
    first = 2 * tokens * (D * (heads + 2 * kv) + 3 * SETTING.rank * D)  # nobody asks what went into the first block
    last = 2 * tokens * SETTING.rank * D * TINY.num_hidden_layers  # where computing again stops: what it gives is known
    assert counted == training.operations(SETTING, "dense") - attention - head - first - last
    left_out = 2 * D * TINY.intermediate_size * tokens * TINY.num_hidden_layers
    assert training.operations(SETTING, "ours") == training.operations(SETTING, "dense") - left_out


def test_a_step_is_placed_below_the_matrix_peak(monkeypatch):
    monkeypatch.setattr(training, "peak_of", lambda name, setting: (100, 300))
    limits = Limits(1e9, {"bfloat16": 1e12})
    (row,) = training.measure(SETTING, dropouts=(0.0,), repeats=1, limits=limits)
    step = SETTING.batch * SETTING.tokens / row["ours_tokens_s"]
    assert row["ours_of_roof"] == pytest.approx(training.operations(SETTING, "ours") / step / 1e12)


def test_the_profile_names_what_takes_time():
    assert "aten::mm" in training.profile(SETTING)
