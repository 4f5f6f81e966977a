"""LLaMA answers what the reference implementation answered, from every layout, and what algebra demands."""

import json

import pytest
import torch

import models
from models.cache import attend_to_all
from models.config import LlamaConfig, llama_config
from models.llama import Llama
from tests.golden import DATA, GOLDEN, LAYOUTS, answers, layout


@pytest.fixture(params=LAYOUTS)
def case(request, tmp_path):
    return models.load(layout(request.param, tmp_path), dtype=torch.float32), answers(request.param)


def test_logits_loss_and_gradients_are_the_reference_implementations(case):
    model, io = case
    batch = {key: io[key] for key in ("input_ids", "attention_mask", "labels")}
    logits = model(io["input_ids"], io["attention_mask"])
    there = io["attention_mask"].bool()
    torch.testing.assert_close(logits[there], io["logits"][there], atol=1e-4, rtol=0)

    loss = model.loss(**batch)
    torch.testing.assert_close(loss, io["loss"], atol=1e-4, rtol=0)
    loss.backward()
    for key, gradient in io.items():
        if key.startswith("grad."):
            ours = model.get_parameter(key.removeprefix("grad.")).grad
            torch.testing.assert_close(ours, gradient, atol=1e-4, rtol=0)


def test_greedy_text_is_the_reference_implementations(case):
    model, io = case
    ids = models.generate(model, io["input_ids"][:1, :6], max_new_tokens=12, eos_token_id=-1)
    assert torch.equal(ids, io["greedy"])
    left = models.generate(model, io["left_ids"], io["left_mask"], max_new_tokens=8, eos_token_id=-1)
    assert torch.equal(left, io["left_greedy"])


def test_a_real_trained_model_tells_its_story():
    expected = json.loads((DATA / "stories260K" / "expected.json").read_text())["greedy_ids_from_bos"]
    model = models.load(DATA / "stories260K", dtype=torch.float32)
    ids = models.generate(model, torch.tensor([[1]]), max_new_tokens=200, eos_token_id=-1)
    assert ids[0].tolist() == expected


@pytest.fixture
def small():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
    )
    model = Llama(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_padding_on_either_side_changes_nothing_that_is_there(small):
    ids = torch.randint(0, 37, (1, 7))
    alone = small(ids)
    pads = torch.randint(0, 37, (1, 4))
    ones, zeros = torch.ones_like(ids), torch.zeros_like(pads)
    right = small(torch.cat([ids, pads], 1), torch.cat([ones, zeros], 1))[:, :7]
    left = small(torch.cat([pads, ids], 1), torch.cat([zeros, ones], 1))[:, 4:]
    torch.testing.assert_close(right, alone)
    torch.testing.assert_close(left, alone)
    assert not small(torch.cat([pads, ids], 1), torch.cat([zeros, ones], 1)).isnan().any()


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_a_cache_changes_nothing(small, cut):
    ids = torch.randint(0, 37, (2, 7))
    cache = small.new_cache(2, 7)
    parts = torch.cat([small(ids[:, :cut], cache=cache), small(ids[:, cut:], cache=cache)], dim=1)
    torch.testing.assert_close(parts, small(ids))
    with pytest.raises(ValueError, match="the cache has room for 7 tokens; 8 do not fit"):
        small(ids[:, :1], cache=cache)


@pytest.mark.parametrize(("heads", "shared"), [(3, 1), (6, 2), (4, 4)])
@pytest.mark.parametrize("padded", [False, True])
def test_one_token_draws_from_all_before_it_by_its_own_heads_keys(heads, shared, padded):
    B, S, C = 2, 7, 8
    q, k, v = (torch.randn(B, *sizes, C) for sizes in ((heads, 1), (shared, S), (shared, S)))
    mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
    if padded:
        mask[1, :, :, :3] = False
    found = attend_to_all(q, k, v, mask if padded else None)
    for b in range(B):
        for h in range(heads):
            keys, values = k[b, h * shared // heads].double(), v[b, h * shared // heads].double()
            scores = (keys @ q[b, h, 0].double() / C**0.5).masked_fill(~mask[b, 0, 0], -torch.inf)
            assert torch.allclose(found[b, h, 0].double(), scores.softmax(0) @ values, atol=1e-6)


def test_checkpointed_gradients_are_the_same(small):
    ids = torch.randint(0, 37, (2, 9))
    small.loss(input_ids=ids, labels=ids).backward()
    plain = [p.grad.clone() for p in small.parameters()]
    small.zero_grad()
    small.gradient_checkpointing = True
    small.loss(input_ids=ids, labels=ids).backward()
    for before, parameter in zip(plain, small.parameters(), strict=True):
        assert torch.equal(before, parameter.grad)


def test_the_loss_is_the_mean_over_the_labels_it_counts(small):
    ids = torch.randint(0, 37, (3, 8))
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1] = -100
    logits = small(ids)[:, :-1].log_softmax(-1)
    scored = labels[:, 1:] != -100
    expected = -logits.gather(2, ids[:, 1:, None])[..., 0][scored].mean()
    torch.testing.assert_close(small.loss(input_ids=ids, labels=labels), expected)
    assert small.label_count(labels) == int(scored.sum()) == 3 + 7


def test_a_batch_without_a_label_is_refused(small):
    ids = torch.randint(0, 37, (1, 4))
    with pytest.raises(ValueError, match="no label to score"):
        small.loss(input_ids=ids, labels=torch.full_like(ids, -100))


def test_a_mask_of_another_shape_is_refused(small):
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\).*need \(1, 4\)"):
        small(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 3))


def test_a_config_survives_being_written():
    for name in ("llama-gqa", "llama-headdim-bias", "llama3-rope-tied"):
        config = llama_config(json.loads((GOLDEN / name / "config.json").read_text()), "config.json")
        assert llama_config(config.to_dict(), "written") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "config.json: lacks hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_attention_heads": 5, "head_dim": None}, "hidden_size 64 does not split into 5"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"head_dim": 15}, "head_dim is 15; rotary"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary scaling 'yarn' is not known"),
        ({"rope_parameters": {"rope_type": "linear"}}, "needs a factor"),
    ],
)
def test_a_config_that_asks_for_other_arithmetic_is_refused(change, message):
    raw = json.loads((GOLDEN / "llama-gqa" / "config.json").read_text())
    with pytest.raises(models.CheckpointError, match=message):
        llama_config({**raw, **change}, "config.json")
