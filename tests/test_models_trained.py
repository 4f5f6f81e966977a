"""What is trained, written and put back: a training that goes on from it cannot be told from one that never stopped."""

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
import nf4
from models.errors import CheckpointError
from models.trained import restore_trained, save_model, save_trained
from models.whole import train_every_weight, trained_parameters
from tests import tiny, tiny_t5
from tests.golden import GOLDEN

IDS = torch.arange(24).view(2, 12) % 37
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "pissa": {"init": "pissa"},
    "loftq": {"init": "loftq"},
    "16-bit adapters": {"dtype": "bfloat16"},
    "embedding": {"modules_to_save": ("embed_tokens",)},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def prepared(path, method, dtype, seed=0):
    """A model that is ready to be trained; everything that is random in it follows from the seed."""
    torch.manual_seed(seed)
    if method == "full":
        model = models.load(path, dtype=dtype)
        train_every_weight(model)
    else:
        model = models.load(path, nf4.QuantConfig(), dtype=dtype)
        models.attach_lora(model, models.LoraConfig(rank=4, dropout=0.0, **METHODS[method]))
    return model


def steps(model, count):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(count):
        loss = model.loss(input_ids=IDS, labels=IDS)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [*METHODS, "full"])
def test_training_goes_on_as_if_it_had_not_stopped(tmp_path, llama, method, dtype):
    model = prepared(llama, method, dtype)
    steps(model, 2)
    save_trained(model, tmp_path)
    again = prepared(llama, method, dtype, seed=1)
    restore_trained(again, tmp_path)
    for name, parameter in trained_parameters(model).items():
        assert torch.equal(trained_parameters(again)[name], parameter), name
    assert steps(again, 2) == steps(model, 2)


@pytest.mark.parametrize("name", ["llama", "t5", "tied t5", "roberta"])
def test_steps_too_small_for_bfloat16_are_not_lost_in_full_fine_tuning(tmp_path, llama, name):
    path = {"llama": llama, "roberta": GOLDEN / "roberta-classify"}.get(name)
    if path is None:
        path = tiny_t5.checkpoint(tmp_path / "t5", **({} if name == "tied t5" else tiny_t5.V1_1))
    model = prepared(path, "full", torch.bfloat16)
    labels = torch.tensor([0, 1]) if name == "roberta" else IDS
    before = model.loss(input_ids=IDS, labels=labels)
    assert model.dtype == torch.bfloat16
    before.backward()
    parameters = trained_parameters(model)
    assert len(parameters) == len(list(models.load(path).named_parameters()))
    for parameter in parameters.values():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
    largest = max(parameters.values(), key=torch.numel)
    start = largest.detach().clone()
    with torch.no_grad():
        for _ in range(32):
            largest.mul_(1 + 2**-12)  # an eighth of the last digit of a bfloat16
    assert not torch.equal(largest.bfloat16(), start.bfloat16())


def test_the_gradients_of_float32_weights_behind_16_bits_are_close_to_those_of_float32(llama):
    wide, narrow = prepared(llama, "full", torch.float32), prepared(llama, "full", torch.bfloat16)
    for model in (wide, narrow):
        model.loss(input_ids=IDS, labels=IDS).backward()
    for name, parameter in trained_parameters(wide).items():
        other = trained_parameters(narrow)[name]
        assert parameter.grad is not None
        assert other.grad is not None
        assert ((other.grad - parameter.grad).norm() / parameter.grad.norm()).item() < 0.05, name


def test_recomputing_activations_changes_no_gradient_of_a_full_fine_tuning(llama):
    kept, again = prepared(llama, "full", torch.bfloat16), prepared(llama, "full", torch.bfloat16)
    again.gradient_checkpointing = True
    assert steps(kept, 2) == steps(again, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_finished_model_is_a_checkpoint_in_the_dtype_it_computes_in(tmp_path, llama, dtype):
    model = prepared(llama, "full", dtype)
    steps(model, 2)
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert set(stored) == set(load_file(llama / "model.safetensors"))
    assert torch.equal(models.load(tmp_path, dtype=dtype)(IDS), model(IDS))


# Refusals


def test_what_holds_nan_is_not_saved(tmp_path, llama):
    model = prepared(llama, "full", torch.bfloat16)
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    for write in (save_trained, save_model):
        with pytest.raises(ValueError, match=r"not saved: 1 tensors hold NaN or infinity, model.embed_tokens.weight"):
            write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_trained_has_nothing_to_save(tmp_path, llama):
    model = models.load(llama, nf4.QuantConfig())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing in the model is trained"):
        save_trained(model, tmp_path)
    with pytest.raises(ValueError, match=r"14 layers are quantized \(first: model.layers.0.self_attn.q_proj\)"):
        train_every_weight(model)


def lose(tensors):
    tensors.pop(next(iter(tensors)))


def add(tensors):
    tensors["new.weight"] = torch.zeros(1)


def reshape(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name].T.contiguous()


def narrow(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name].bfloat16()


def poison(tensors):
    next(iter(tensors.values()))[0] = float("inf")


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose, r"was saved of another training: lacks model\."),
        (add, r"was saved of another training: has new.weight, which is not trained here"),
        (reshape, r"is \[\d+, \d+\] in float32, expected \[\d+, \d+\] in float32"),
        (narrow, r"is \[\d+, \d+\] in bfloat16, expected \[\d+, \d+\] in float32"),
        (poison, r"holds NaN or infinity; the training that made it failed"),
    ],
)
def test_what_was_saved_of_another_training_is_refused_and_changes_nothing(tmp_path, llama, method, change, message):
    model = prepared(llama, method, torch.float32)
    save_trained(model, tmp_path)
    file = tmp_path / ("model.safetensors" if method == "full" else "adapter_model.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    steps(model, 1)
    before = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
    with pytest.raises(CheckpointError, match=message):
        restore_trained(model, tmp_path)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained_parameters(model).items())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_directory_without_what_is_trained_is_refused(tmp_path, llama, method):
    other = prepared(llama, "lora" if method == "full" else "full", torch.float32)
    save_trained(other, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        restore_trained(prepared(llama, method, torch.float32), tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
