"""Exports: what other tools read is what the model is, and whatever cannot be is refused before anything is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
import nf4
from models.gguf_writer import weight_of
from models.linear import Linear, NF4Linear
from models.llama import Llama
from tests import tiny
from tests.exporting import as_run, export, told, trained_run
from tests.golden import DATA, GOLDEN


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("export") / "base")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return trained_run(base, tmp_path_factory.mktemp("export") / "run")


# Adapters


def test_an_exported_adapter_is_the_runs_with_the_bases_name_and_tokenizer(run, base, tmp_path, capsys):
    result = told(capsys, run, tmp_path / "out", "--format", "adapter")
    assert result["learned"] == 4
    before, after = (load_file(d / "adapter_model.safetensors") for d in (run / "adapter", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config.pop("base_model_name_or_path") == str(base)
    told_before = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config == {key: value for key, value in told_before.items() if key != "base_model_name_or_path"}
    assert models.load_tokenizer(tmp_path / "out").encode("It is red.") == models.load_tokenizer(base).encode(
        "It is red."
    )


def test_the_base_may_have_another_name_for_others(run, tmp_path):
    export(run, tmp_path / "out", "--base", "someone/base-7b")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/base-7b"


def test_an_adapter_that_learned_nothing_or_fits_nothing_is_refused(run, base, tmp_path, capsys):
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    broken = shutil.copytree(run / "adapter", tmp_path / "broken")
    cases = {
        "every B is zero": {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()},
        "NaN or infinity": {n: t / 0 for n, t in tensors.items()},
        "for another model": {n: t[:, :-1].contiguous() for n, t in tensors.items()},
    }
    for message, changed in cases.items():
        save_file(changed, broken / "adapter_model.safetensors")
        assert message in told(capsys, base, tmp_path / "out", "--load.adapter", broken, code=4)
        assert not (tmp_path / "out").exists()
    assert "has no adapter" in told(capsys, base, tmp_path / "out", code=2)


# 4 bits


def test_the_codes_are_those_of_the_reference_for_the_same_weights(base, tmp_path):
    for codebook in ("nf4", "fp4"):
        reference = load_file(DATA / "blockwise" / f"linear-{codebook}.safetensors")
        source = tmp_path / f"source-{codebook}"
        wide = models.config.LlamaConfig(
            vocab_size=models.load_tokenizer(base).vocab_size,
            hidden_size=128,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
        )
        model = Llama(wide)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        up = model.get_submodule("model.layers.0.mlp.up_proj")
        up.weight = torch.nn.Parameter(reference["full_weight"])
        models.save(model, source)
        models.save_tokenizer(models.load_tokenizer(base), source)
        export(
            source, tmp_path / codebook, "--format", "nf4", "--load.quant.codebook", codebook, "--load.dtype", "float32"
        )
        found = load_file(tmp_path / codebook / "model.safetensors")
        ours = {n.removeprefix("model.layers.0.mlp.up_proj."): t for n, t in found.items() if "up_proj" in n}
        theirs = {n.removeprefix("layer."): t for n, t in reference.items() if n.startswith("layer.weight")}
        assert ours.keys() == theirs.keys()
        assert torch.equal(ours["weight"], theirs["weight"])
        assert torch.equal(ours["weight.quant_map"], theirs["weight.quant_map"])
        assert torch.equal(ours["weight.nested_quant_map"], theirs["weight.nested_quant_map"])
        off = ours["weight.absmax"].int() - theirs["weight.absmax"].int()  # the reference's table is off now and then
        assert int(off.abs().max()) <= 1


def test_a_4_bit_export_says_which_layers_are_dense(run, tmp_path, capsys):
    result = told(capsys, run, tmp_path / "out", "--format", "nf4")
    assert result["layers"] == 14
    assert "the adapter is not in it" in result["notes"][0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }
    assert models.load_tokenizer(tmp_path / "out").encode("red")


def test_layers_that_others_never_quantize_are_written_dense(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Llama, "always_dense", ("down_proj",))
    export(base, tmp_path / "out", "--format", "nf4", "--load.dtype", "float32")
    skipped = ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == skipped
    model, source = models.load(tmp_path / "out", dtype=torch.float32), models.load(base, dtype=torch.float32)
    name = "model.layers.0.mlp.down_proj"
    assert isinstance(model.get_submodule(name), Linear)
    assert torch.equal(model.get_parameter(f"{name}.weight"), source.get_parameter(f"{name}.weight"))

    # from a checkpoint that has them in 4 bits they are decoded, and the file of that one is not called bitsandbytes'
    models.save(models.load(base, nf4.QuantConfig(), torch.float32), tmp_path / "all")
    models.save_tokenizer(models.load_tokenizer(base), tmp_path / "all")
    method = json.loads((tmp_path / "all" / "config.json").read_text())["quantization_config"]["quant_method"]
    assert method == "qlora-from-scratch"
    export(tmp_path / "all", tmp_path / "decoded", "--format", "nf4")
    stored = models.load(tmp_path / "all", dtype=torch.float32).get_submodule(name)
    assert isinstance(stored, NF4Linear)
    decoded = models.load(tmp_path / "decoded", dtype=torch.float32)
    assert torch.equal(decoded.get_parameter(f"{name}.weight"), stored.dense_weight())


def test_a_4_bit_export_that_cannot_be_read_back_is_not_kept(base, tmp_path, capsys, monkeypatch):
    def refuses(*_):
        raise models.CheckpointError("it was not read back")

    monkeypatch.setattr("models.nf4_export.read_back", refuses)
    assert "not read back" in told(capsys, base, tmp_path / "out", "--format", "nf4", code=4)
    assert list(tmp_path.iterdir()) == []


def test_a_stored_checkpoint_is_exported_with_its_codes(base, tmp_path):
    models.save(models.load(base, nf4.QuantConfig("fp4", 128, double_quant=False)), tmp_path / "stored")
    models.save_tokenizer(models.load_tokenizer(base), tmp_path / "stored")
    export(tmp_path / "stored", tmp_path / "out", "--format", "nf4")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("stored", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_merged_4_bit_export_is_the_merged_model_quantized(run, base, tmp_path, capsys):
    result = told(capsys, run, tmp_path / "out", "--format", "nf4", "--merge")
    assert "times as far as the adapter did" in result["notes"][0]
    assert 0.05 < result["worst_relative_error"] < 0.2
    model, found = as_run(run, base), models.load(tmp_path / "out", dtype=torch.float32)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        expected = nf4.quantize(weight_of(model, f"{name}.weight"), nf4.QuantConfig())
        layer = found.get_submodule(name)
        assert isinstance(layer, NF4Linear)
        assert torch.equal(layer.quantized.packed, expected.packed)
    untouched = "model.layers.0.self_attn.k_proj"
    before, after = model.get_submodule(untouched), found.get_submodule(untouched)
    assert isinstance(before, NF4Linear)
    assert isinstance(after, NF4Linear)
    assert torch.equal(after.quantized.packed, before.quantized.packed)
    assert torch.equal(after.quantized.scales, before.quantized.scales)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load.quant.codebook", "int4"], "codebook int4 is known here alone; choose nf4 or fp4"),
        (["--load.quant.codebook", "nf3"], "codebook nf3"),
        (["--load.quant.block-size", "48"], "block_size 48 is known here alone"),
        (["--load.quant.nested-block-size", "128"], "nested_block_size 128 is known here alone"),
        (["--merge"], "--merge needs an adapter"),
    ],
)
def test_formats_that_others_do_not_know_are_refused(base, tmp_path, capsys, flags, message):
    assert message in told(capsys, base, tmp_path / "out", "--format", "nf4", *flags, code=2)
    assert list(tmp_path.iterdir()) == []


def test_a_stored_checkpoint_in_a_format_of_ours_is_refused(base, tmp_path, capsys):
    models.save(models.load(base, nf4.QuantConfig("int4")), tmp_path / "stored")
    models.save_tokenizer(models.load_tokenizer(base), tmp_path / "stored")
    err = told(capsys, tmp_path / "stored", tmp_path / "out", "--format", "nf4", code=2)
    assert "codebook int4 is known here alone" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["t5-v1_0", "t5-v1_1", "roberta-mlm", "roberta-classify"])
def test_a_gguf_is_of_a_llama_and_4_bits_of_any_model(case, base, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / case / file, source)
    models.save_tokenizer(models.load_tokenizer(base), source)
    assert "a GGUF needs a causal language model" in told(
        capsys, source, tmp_path / "m.gguf", "--format", "gguf", code=2
    )
    export(source, tmp_path / "out", "--format", "nf4", "--load.dtype", "float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    model = models.load(tmp_path / "out", dtype=torch.float32)
    dense = {n for n, m in model.named_modules() if isinstance(m, Linear | torch.nn.Linear)}
    assert config["quant_method"] == "bitsandbytes"
    assert set(config["llm_int8_skip_modules"]) == dense | set(model.heads)
    assert all(name.endswith(".wo") == case.startswith("t5") for name in dense if "layer" in name)


# Refusals of the command


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "onnx"], "format 'onnx' is not known; choose adapter, nf4, gguf"),
        (["--format", "gguf", "--gguf-type", "q4_0"], "gguf_type 'q4_0' is not known"),
        (["--format", "gguf"], "name a file that ends in .gguf"),
        (["--format", "gguf", "--merge"], "--merge is for --format nf4"),
    ],
)
def test_an_impossible_export_is_refused(base, tmp_path, capsys, flags, message):
    assert message in told(capsys, base, tmp_path / "out", *flags, code=2)


def test_nothing_is_overwritten(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is not empty" in told(capsys, run, tmp_path / "out", code=2)
    (tmp_path / "m.gguf").write_text("mine")
    assert "is not there yet" in told(capsys, run, tmp_path / "m.gguf", "--format", "gguf", code=2)
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_no_exported_file_names_the_machine(run, tmp_path):
    export(run, tmp_path / "m.gguf", "--format", "gguf")
    export(run, tmp_path / "nf4", "--format", "nf4")
    for file in [tmp_path / "m.gguf", *(tmp_path / "nf4").iterdir()]:
        assert str(tmp_path.parent).encode() not in file.read_bytes()
