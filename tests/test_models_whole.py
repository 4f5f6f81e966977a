"""Modules that are trained whole: which they are, in which precision they learn, and how they end up."""

import pytest
import torch
from safetensors.torch import load_file

import models
import nf4
from models.attachment import adapted_layers
from models.methods import detach
from models.whole import trained_parameter, within
from tests.golden import GOLDEN
from tests.tiny_classifier import Classifier

IDS = torch.arange(24).view(2, 12) % 128
SAVED = ("lm_head", "embed_tokens", "layers.1.input_layernorm")
PARAMETERS = ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight")


def base(quant=None, dtype=torch.float32, name="llama-gqa"):
    return models.load(GOLDEN / name, quant, dtype=dtype)


def with_saved(quant=None, dtype=torch.float32, **options):
    model = base(quant, dtype)
    models.attach_lora(model, models.LoraConfig(rank=2, dropout=0.0, modules_to_save=SAVED, **options))
    return model


def step(model, rate):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate)
    model.loss(input_ids=IDS, labels=IDS).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", [None, nf4.QuantConfig()])
def test_attaching_changes_no_answer_and_a_step_moves_adapters_and_these_modules_only(quant, dtype):
    model = base(quant, dtype)
    before, held = model(IDS), {n: t.clone() for n, t in model.state_dict().items()}
    models.attach_lora(model, models.LoraConfig(rank=2, dropout=0.0, modules_to_save=SAVED))
    assert torch.equal(model(IDS), before)
    assert model.dtype == dtype
    start = {name: trained_parameter(model, name).detach().clone() for name in PARAMETERS}
    step(model, 0.1)
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in held.items() if n not in PARAMETERS and n in after)
    for name in PARAMETERS:
        assert trained_parameter(model, name).requires_grad
        assert not torch.equal(trained_parameter(model, name), start[name])
    adapters = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name}
    assert len(adapters) == 2 * 7 * 2
    assert sum(p.requires_grad for p in model.parameters()) == len(adapters) + len(PARAMETERS)


def test_steps_too_small_for_bfloat16_are_not_lost():
    """The weight that learns is float32; the model computes with it rounded."""
    model = with_saved(dtype=torch.bfloat16)
    assert isinstance(model, models.Llama)
    weight = trained_parameter(model, "lm_head.weight")
    assert weight.dtype == torch.float32
    assert model.head_weight.dtype == torch.bfloat16
    start = model.head_weight.detach().clone()
    for _ in range(300):
        with torch.no_grad():
            weight.mul_(1 + 2**-12)  # an eighth of the last digit of a bfloat16
    assert float((model.head_weight.detach().float().norm() / start.float().norm()).log2()) > 0.05
    assert model(IDS).dtype == torch.bfloat16


def test_a_narrower_adapter_dtype_does_not_narrow_them():
    model = with_saved(dtype=torch.float32)
    assert trained_parameter(model, "lm_head.weight").dtype == torch.float32
    model = base()
    models.attach_lora(model, models.LoraConfig(rank=2, modules_to_save=("lm_head",), dtype="bfloat16"))
    assert trained_parameter(model, "lm_head.weight").dtype == torch.float32
    assert model.get_parameter("model.layers.0.mlp.up_proj.lora_A.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_saved_under_their_own_names_and_come_back(tmp_path, dtype):
    model = with_saved(nf4.QuantConfig(), dtype)
    step(model, 0.5)
    models.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name in PARAMETERS:
        assert torch.equal(tensors[f"base_model.model.{name}"], trained_parameter(model, name))
        assert tensors[f"base_model.model.{name}"].dtype == torch.float32
    again = base(nf4.QuantConfig(), dtype)
    models.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    for name in PARAMETERS:
        assert torch.equal(trained_parameter(again, name), trained_parameter(model, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_leaves_plain_parameters_in_the_models_dtype(tmp_path, dtype):
    model = with_saved(None, dtype)
    step(model, 0.5)
    before = model(IDS)
    names = set(base().state_dict())
    models.merge_adapter(model)
    assert set(model.state_dict()) == names
    assert {p.dtype for p in model.parameters()} == {dtype}
    torch.testing.assert_close(model(IDS), before, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=0)
    models.save(model, tmp_path / "merged")
    assert torch.equal(models.load(tmp_path / "merged", dtype=dtype)(IDS), model(IDS))
    models.attach_lora(model, models.LoraConfig(rank=2, modules_to_save=("lm_head",)))  # another may follow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detaching_gives_their_values_back(dtype):
    model = with_saved(None, dtype)
    step(model, 0.5)
    detach(model)
    expected = base(None, dtype)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(t, expected.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_tied_head_is_trained_with_its_embedding():
    model = base(name="llama3-rope-tied")
    assert isinstance(model, models.Llama)
    models.attach_lora(model, models.LoraConfig(rank=2, modules_to_save=("embed_tokens",)))
    before = model.head_weight.detach().clone()
    step(model, 0.5)
    assert not torch.equal(model.head_weight, before)


def test_a_linear_layer_that_is_trained_whole_gets_no_adapter():
    model = base()
    models.attach_lora(model, models.LoraConfig(rank=2, modules_to_save=("layers.0.mlp",)))
    adapted = {name for name, _ in adapted_layers(model)}
    assert len(adapted) == 11
    assert not any(name.startswith("model.layers.0.mlp") for name in adapted)
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad


def test_a_head_of_several_layers_is_one_module():
    model = Classifier()
    models.attach_lora(model, models.LoraConfig(rank=2, modules_to_save=("classifier",)))
    whole = {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}
    assert whole == {f"classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.head", True), ("a.head.dense", True), ("a.overhead", False), ("head", True), ("header", False), ("a", False)],
)
def test_a_name_stands_for_a_module_and_what_is_inside(name, expected):
    assert within(name, ["x", "head"]) is expected


# Refusals


@pytest.mark.parametrize("saved", ["q_proj", "layers.1.mlp", "layers"])
def test_quantized_layers_cannot_be_trained_whole(saved):
    model = base(nf4.QuantConfig())
    with pytest.raises(ValueError, match=r"is quantized and cannot be trained whole; give it an adapter, or load"):
        models.attach_lora(
            model, models.LoraConfig(rank=2, modules_to_save=(saved,), target_modules=("o_proj", "k_proj"))
        )
    assert next(adapted_layers(model), None) is None


@pytest.mark.parametrize(
    ("name", "saved", "message"),
    [
        ("llama-gqa", "classifier", r"no module with weights is called classifier; this model has .*lm_head, mlp"),
        ("llama3-rope-tied", "lm_head", r"called lm_head; this model has .*; its head is its embedding"),
    ],
)
def test_a_module_that_the_model_lacks_is_refused(name, saved, message):
    with pytest.raises(ValueError, match=message):
        models.attach_lora(base(name=name), models.LoraConfig(rank=2, modules_to_save=(saved,)))
