"""LoRA: what it is at the start, what it trains, what it saves, and what it is merged into."""

import pytest
import torch

import models
import nf4
from models.attachment import adapted_layers
from models.linear import NF4Linear
from tests.golden import GOLDEN, answers

IDS = torch.arange(24).view(2, 12) % 128


def base(quant=None):
    return models.load(GOLDEN / "llama-gqa", quant, dtype=torch.float32)


@pytest.mark.parametrize("name", ["lora", "lora-rslora"])
def test_an_adapter_gives_the_reference_implementations_answers(name):
    model, io = base(), answers(name)
    models.load_adapter(model, GOLDEN / name)
    there = io["attention_mask"].bool()
    logits = model(io["input_ids"], io["attention_mask"])
    torch.testing.assert_close(logits[there], io["logits"][there], atol=1e-4, rtol=0)
    loss = model.loss(input_ids=io["input_ids"], attention_mask=io["attention_mask"], labels=io["labels"])
    torch.testing.assert_close(loss, io["loss"], atol=1e-4, rtol=0)
    loss.backward()
    for key, gradient in io.items():
        if key.startswith("grad."):
            ours = key.removeprefix("grad.base_model.model.").replace(".default", "")
            torch.testing.assert_close(model.get_parameter(ours).grad, gradient, atol=1e-4, rtol=0)

    models.merge_adapter(model)
    merged = model(io["input_ids"], io["attention_mask"])
    torch.testing.assert_close(merged[there], io["logits"][there], atol=1e-4, rtol=0)


@pytest.mark.parametrize("quant", [None, nf4.QuantConfig()])
def test_a_new_adapter_changes_nothing_and_alone_is_trained(quant):
    model = base(quant)
    before = model(IDS)
    models.attach_lora(model, models.LoraConfig(rank=4))
    assert torch.equal(model(IDS), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in trained)
    assert not any("lm_head" in name for name in trained)


def test_a_step_of_training_moves_only_the_adapters():
    model = base(nf4.QuantConfig())
    models.attach_lora(model, models.LoraConfig(rank=4, dropout=0.0))
    frozen = {n: t.clone() for n, t in model.state_dict().items() if ".lora_" not in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.loss(input_ids=IDS, labels=IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[n], t) for n, t in frozen.items())


def test_dropout_falls_on_the_branch_only_while_training():
    model = base()
    models.attach_lora(model, models.LoraConfig(rank=4, dropout=0.5))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


def test_ranks_alphas_and_targets_follow_the_configuration():
    model = base()
    config = models.LoraConfig(
        rank=4,
        alpha=8.0,
        target_modules=("q_proj", "up_proj"),
        rank_pattern={"layers.1.mlp.up_proj": 2},
        alpha_pattern={"up_proj": 6.0},
    )
    models.attach_lora(model, config)
    found = {n: (len(m.lora_A.weight), m.scaling) for n, m in adapted_layers(model) if m.lora_A}
    assert found == {
        "model.layers.0.self_attn.q_proj": (4, 2.0),
        "model.layers.1.self_attn.q_proj": (4, 2.0),
        "model.layers.0.mlp.up_proj": (4, 1.5),
        "model.layers.1.mlp.up_proj": (2, 3.0),
    }


def test_merging_is_done_in_float32_and_leaves_a_plain_model(tmp_path):
    model = base(nf4.QuantConfig())
    models.attach_lora(model, models.LoraConfig(rank=4, alpha=8.0))
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, NF4Linear)
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    expected = layer.dense_weight() + 2.0 * layer.lora_B.weight @ layer.lora_A.weight
    models.merge_adapter(model)
    torch.testing.assert_close(model.get_parameter("model.layers.0.mlp.up_proj.weight"), expected)
    assert not any(isinstance(m, NF4Linear) for m in model.modules())
    models.save(model, tmp_path / "merged")
    assert torch.equal(models.load(tmp_path / "merged", dtype=torch.float32)(IDS), model(IDS))


# Refusals


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "q_proj is inf"),
        ({"alpha": 0.0, "init": "pissa"}, "alpha is 0.0; init='pissa' needs an alpha above 0"),
        ({"init": "pisa"}, "init is 'pisa'; choose from default, pissa, loftq; did you mean 'pissa'"),
        ({"init": "loft-q"}, "did you mean 'loftq'"),
        ({"target_modules": "q_proj("}, "target_modules: .* is not a regular expression"),
        ({"rank_pattern": {"[": 2}}, r"rank_pattern: '\[' is not a regular expression"),
        ({"rank_pattern": {"q_proj": -1}}, "q_proj is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"target_modules": ()}, "target_modules is empty"),
    ],
)
def test_impossible_configurations_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        models.LoraConfig(**kwargs)


def test_a_target_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match="no layer is called query; this model has down_proj, gate_proj"):
        models.attach_lora(base(), models.LoraConfig(target_modules=("q_proj", "query")))


def test_adapters_are_not_attached_twice_nor_saved_when_absent(tmp_path):
    model = base()
    with pytest.raises(ValueError, match="has no adapters"):
        models.save_adapter(model, tmp_path)
    models.attach_lora(model, models.LoraConfig(rank=2))
    with pytest.raises(ValueError, match="already has adapters"):
        models.attach_lora(model, models.LoraConfig(rank=2))
