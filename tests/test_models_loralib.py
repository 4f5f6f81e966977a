"""Adapters as microsoft/LoRA's examples save them: the same branch and head, and what the file does not say."""

import logging

import pytest
import torch

import models
from models.attachment import adapted_layers
from tests.tiny_classifier import LABELS, LAYERS, WIDTH, Classifier

IDS = torch.arange(24).view(2, 12) % 32
RANK = 4


def tensors(rank=RANK):
    """The form of roberta_base_lora_mnli.bin: query and value of every layer, and the classifier."""
    torch.manual_seed(5)
    layers = [f"roberta.encoder.layer.{i}.attention.self.{part}" for i in range(LAYERS) for part in ("query", "value")]
    state = {}
    for layer in layers:
        state[f"{layer}.lora_A"] = torch.randn(rank, WIDTH)
        state[f"{layer}.lora_B"] = torch.randn(WIDTH, rank)
    head = {"dense.weight": (WIDTH, WIDTH), "dense.bias": (WIDTH,)}
    head |= {"out_proj.weight": (LABELS, WIDTH), "out_proj.bias": (LABELS,)}
    return state | {f"classifier.{name}": torch.randn(shape) for name, shape in head.items()}


def expected(state, alpha):
    """The model with the branches multiplied out and the head put in."""
    model = Classifier()
    weights = model.state_dict()
    for name, tensor in state.items():
        if name.endswith(".lora_A"):
            layer = name.removesuffix(".lora_A")
            weights[f"{layer}.weight"] += alpha / len(tensor) * state[f"{layer}.lora_B"] @ tensor
        elif not name.endswith(".lora_B"):
            weights[name] = tensor
    model.load_state_dict(weights)
    return model(IDS)


@pytest.mark.parametrize("as_directory", [False, True])
def test_the_file_gives_its_branches_and_its_head(tmp_path, as_directory, caplog):
    state = tensors()
    torch.save(state, tmp_path / "roberta_lora.bin")
    model = Classifier()
    with caplog.at_level(logging.WARNING):
        models.load_adapter(model, tmp_path if as_directory else tmp_path / "roberta_lora.bin")
    torch.testing.assert_close(model(IDS), expected(state, 16.0), atol=1e-4, rtol=1e-4)
    assert "roberta_lora.bin does not say its alpha; taking 16" in caplog.text
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * LAYERS + 4


def test_alpha_can_be_told(tmp_path, caplog):
    state = tensors()
    torch.save(state, tmp_path / "a.bin")
    model = Classifier()
    models.load_adapter(model, tmp_path / "a.bin", alpha=6.0)
    torch.testing.assert_close(model(IDS), expected(state, 6.0), atol=1e-4, rtol=1e-4)
    assert not caplog.records


def test_it_is_saved_again_as_any_adapter(tmp_path):
    torch.save(tensors(), tmp_path / "a.bin")
    model, again = Classifier(), Classifier()
    models.load_adapter(model, tmp_path / "a.bin", alpha=6.0)
    models.save_adapter(model, tmp_path / "peft")
    models.load_adapter(again, tmp_path / "peft")
    assert torch.equal(again(IDS), model(IDS))


def test_layers_may_have_ranks_of_their_own(tmp_path):
    state = tensors()
    layer = "roberta.encoder.layer.1.attention.self.query"
    state |= {f"{layer}.lora_A": torch.randn(2, WIDTH), f"{layer}.lora_B": torch.randn(WIDTH, 2)}
    torch.save(state, tmp_path / "a.bin")
    model = Classifier()
    models.load_adapter(model, tmp_path / "a.bin", alpha=6.0)
    torch.testing.assert_close(model(IDS), expected(state, 6.0), atol=1e-4, rtol=1e-4)


# Refusals

LAYER = "roberta.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}.lora_A": torch.ones(2 * RANK, WIDTH)}, r"lora_A \[8, 16\] and lora_B \[16, 4\], a fused layer"),
        ({f"{LAYER}.lora_A": torch.ones(5, WIDTH)}, r"lora_A \[5, 16\] and lora_B \[16, 4\], no pair of one rank"),
        ({f"{LAYER}.lora_A": torch.ones(WIDTH)}, r"lora_A \[16\] and lora_B \[16, 4\], not a pair"),
        ({f"{LAYER}.lora_A": torch.ones(0, WIDTH), f"{LAYER}.lora_B": torch.ones(WIDTH, 0)}, "not a pair"),
        ({f"{LAYER}.lora_B": None}, r"lora_B \[\], not a pair"),
        ({f"{LAYER}.lora_A": None}, r"for another model: has .*query.lora_B.weight, which this model has no place for"),
        ({f"{LAYER}.lora_A": torch.ones(RANK, 8)}, r"lora_A.weight is \[4, 8\], expected \[4, 16\]"),
        ({f"{LAYER}.lora_A": torch.full((RANK, WIDTH), float("nan"))}, "holds NaN or infinity"),
        ({"classifier.out_proj.bias": torch.ones(2)}, r"classifier.out_proj.bias is \[2\], expected \[3\]"),
        ({"classifier.out_proj.bias": None}, "lacks classifier.out_proj.bias"),
        ({"score.weight": torch.ones(2)}, "no module with weights is called score"),
        ({"h.0.attn.c_attn.lora_A": torch.ones(RANK, 8), "h.0.attn.c_attn.lora_B": torch.ones(8, RANK)}, "h.0.attn"),
    ],
)
def test_a_file_for_another_model_is_refused_and_changes_nothing(tmp_path, change, message):
    state = {name: t for name, t in {**tensors(), **change}.items() if t is not None}
    torch.save(state, tmp_path / "a.bin")
    model = Classifier()
    before = model(IDS)
    with pytest.raises(models.CheckpointError, match=message):
        models.load_adapter(model, tmp_path / "a.bin", alpha=1.0)
    assert next(adapted_layers(model), None) is None
    assert torch.equal(model(IDS), before)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"classifier.weight": torch.ones(1)}, tmp_path / "a.bin")
    with pytest.raises(models.CheckpointError, match="holds no lora_A and lora_B"):
        models.load_adapter(Classifier(), tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(b"no torch file")
    with pytest.raises(models.CheckpointError, match=r"not a whole torch file|would run code or it is broken"):
        models.load_adapter(Classifier(), tmp_path / "b.bin")
    with pytest.raises(models.CheckpointError, match=r"no adapter_config\.json"):
        models.load_adapter(Classifier(), tmp_path)  # two files: neither is meant
