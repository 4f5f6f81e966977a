"""4-bit checkpoints of other writers are loaded as they are, and keep their codes when they are saved again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
import nf4
from models.checkpoint import place
from models.linear import Linear, NF4Linear
from models.readers import RenamedReader, SafetensorsReader
from tests import tiny
from tests.golden import GOLDEN


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("export") / "base")


def test_a_reference_4_bit_checkpoint_is_loaded_as_it_is():
    reference = load_file(GOLDEN / "llama-bnb-4bit" / "io.safetensors")
    model = models.load(GOLDEN / "llama-bnb-4bit")  # recorded as bfloat16, to which its weights are rounded
    assert sum(isinstance(m, NF4Linear) for m in model.modules()) == 13
    assert isinstance(model.get_submodule("model.layers.1.mlp.down_proj"), Linear)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NF4Linear):
            model.set_submodule(name, Linear.from_weight(layer.dense_weight()))
    logits = model.float()(reference["input_ids"])
    torch.testing.assert_close(logits, reference["logits"], rtol=1e-4, atol=1e-5)


def test_layers_that_a_stored_checkpoint_left_dense_stay_dense_whatever_format_is_asked_for(tmp_path):
    for quant in (nf4.QuantConfig(), nf4.QuantConfig(scale="search")):
        model = models.load(GOLDEN / "llama-bnb-4bit", quant)
        assert isinstance(model.get_submodule("model.layers.1.mlp.down_proj"), Linear)
    with pytest.raises(models.CheckpointError, match="is already quantized"):
        models.load(GOLDEN / "llama-bnb-4bit", nf4.QuantConfig(double_quant=False))


def test_the_parts_of_a_4_bit_weight_are_renamed_with_it(tmp_path):
    quantized = models.load(GOLDEN / "roberta-mlm", nf4.QuantConfig(), torch.float32)
    models.save(quantized, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    bare = {name.removeprefix("roberta."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "m" / "model.safetensors")
    ids = torch.arange(3, 12)[None]
    assert torch.equal(models.load(tmp_path / "m", dtype=torch.float32)(ids), quantized(ids))


def test_a_head_in_4_bits_is_not_named_among_the_dense_layers(tmp_path):
    model = models.load(GOLDEN / "roberta-mlm", nf4.QuantConfig(), torch.float32)
    q = nf4.quantize(model.get_parameter("lm_head.dense.weight"), nf4.QuantConfig())
    place(model, "lm_head.dense.weight", q)
    models.save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["lm_head.decoder"]
    ids = torch.arange(3, 12)[None]
    assert torch.equal(models.load(tmp_path / "m", dtype=torch.float32)(ids), model(ids))


def test_the_parts_go_by_the_name_of_their_weight_alone(tmp_path):
    tensors = nf4.to_state_dict(nf4.quantize(torch.randn(3, 64)), "old.weight")
    save_file(tensors | {"old.bias": torch.zeros(3)}, tmp_path / "m.safetensors")
    names = {"old.weight": "new.weight", "old.bias": "new.bias"}
    renamed = RenamedReader(SafetensorsReader(tmp_path / "m.safetensors"), names.get)
    assert renamed.shapes.keys() == {name.replace("old", "new") for name in tensors} | {"new.bias"}
    assert torch.equal(renamed.read("new.weight.absmax"), tensors["old.weight.absmax"])


def test_a_reference_4_bit_checkpoint_is_saved_with_its_codes(tmp_path):
    models.save(models.load(GOLDEN / "llama-bnb-4bit"), tmp_path / "again")
    before, after = (load_file(d / "model.safetensors") for d in (GOLDEN / "llama-bnb-4bit", tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def test_a_head_that_another_writer_quantized_is_decoded(base, tmp_path):
    source = shutil.copytree(base, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    q = nf4.quantize(tensors.pop("model.embed_tokens.weight"), nf4.QuantConfig())
    save_file(tensors | nf4.to_state_dict(q, "model.embed_tokens.weight"), source / "model.safetensors")
    model = models.load(source, dtype=torch.float32)
    assert torch.equal(model.get_parameter("model.embed_tokens.weight"), nf4.dequantize(q, torch.float32))
