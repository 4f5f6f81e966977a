"""Exports: what other tools read is what the model is, and whatever cannot be is refused before anything is written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
import nf4
import qlora
from models.checkpoint import place
from models.compare import compare
from models.gguf_check import check, rounding
from models.gguf_layout import gguf_name, released_name
from models.gguf_vocabulary import merges_of
from models.gguf_writer import encoded, shapes, stored_as, weight_of, write_gguf
from models.linear import Linear, NF4Linear
from models.llama import Llama, causal
from models.meta_layout import half_rotation_order, interleaved_order
from models.readers import RenamedReader, SafetensorsReader
from models.tokenizer_json import read_tokenizer_json
from tests import tiny
from tests.golden import DATA, GOLDEN


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("export") / "base")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run as `qlora train` leaves it, with an adapter that has learned."""
    directory = tmp_path_factory.mktemp("export") / "run"
    model = models.load(base, nf4.QuantConfig(), torch.float32)
    models.attach_lora(model, models.LoraConfig(rank=4, alpha=8, target_modules=("q_proj", "down_proj")))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    models.save_adapter(model, directory / "adapter")
    (directory / "config.toml").write_text(f'model = "{base.as_posix()}"\ndtype = "float32"\nquantize = true\n')
    return directory


def export(*arguments, code=0):
    assert qlora.main(["export", *map(str, arguments), "--json"]) == code


def told(capsys, *arguments, code=0):
    export(*arguments, code=code)
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 else err


def as_run(run, base):
    """The run's model: base in 4 bits, adapter on it."""
    model = models.load(base, nf4.QuantConfig(), torch.float32)
    models.load_adapter(model, run / "adapter")
    return causal(model, "a test")


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


# A checkpoint of the reference implementation, codes stored as bfloat16


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


# GGUF


def load_gguf(path):
    return causal(models.load(path, dtype=torch.float32), "a test")


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_a_gguf_is_base_and_adapter_merged(run, base, tmp_path, capsys, kind):
    result = told(capsys, run, tmp_path / "m.gguf", "--format", "gguf", "--gguf-type", kind)
    assert result["merged_layers"] == 4
    model, found = as_run(run, base), load_gguf(tmp_path / "m.gguf")
    for name, shape in shapes(model):
        wanted = weight_of(model, name)
        error = (found.get_parameter(name) - wanted).abs()
        assert bool((error <= rounding(wanted, stored_as(name, shape, kind))).all()), name
    ids = torch.arange(40).view(2, 20) * 7 % model.config.vocab_size
    limit = {"f32": 1e-10, "f16": 1e-6, "bf16": 1e-4, "q8_0": 1e-3}[kind]
    assert compare(model(ids), found(ids)).mean_kl < limit
    assert result["kl"] < limit
    tokenizers = models.load_tokenizer(base), models.load_tokenizer(tmp_path / "m.gguf")
    assert tokenizers[0].encode("It is red, 12.") == tokenizers[1].encode("It is red, 12.")
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


@pytest.mark.parametrize("case", ["llama-gqa", "llama3-rope-tied", "llama-headdim-bias"])
def test_every_golden_model_comes_back_from_a_gguf_with_its_logits(case, tmp_path):
    model, tokenizer = causal(models.load(GOLDEN / case, dtype=torch.float32), "a test"), small_tokenizer(tmp_path)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    comparison = check(tmp_path / "m.gguf", model, tokenizer, {name: "f32" for name, _ in shapes(model)})
    assert comparison.weight_error == 0
    io = load_file(GOLDEN / case / "io.safetensors")
    logits = load_gguf(tmp_path / "m.gguf")(io["input_ids"], io["attention_mask"])
    present = io["attention_mask"].bool()
    torch.testing.assert_close(logits[present], io["logits"][present], rtol=1e-4, atol=1e-4)


def test_linear_rope_scaling_comes_back(tmp_path):
    raw = json.loads((GOLDEN / "llama-gqa" / "config.json").read_text())
    config = models.config.llama_config({**raw, "rope_parameters": {"rope_type": "linear", "factor": 3.7}}, "test")
    model = Llama(config)
    model.load_state_dict(models.load(GOLDEN / "llama-gqa", dtype=torch.float32).state_dict())
    tokenizer = small_tokenizer(tmp_path)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    assert check(tmp_path / "m.gguf", model, tokenizer, {name: "f32" for name, _ in shapes(model)}).kl < 1e-9


def small_tokenizer(directory: Path) -> models.Tokenizer:
    """Fifty tokens, so that it fits the golden models' embeddings."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["Ġ", "th", "the", "<|im_start|>", "<|im_end|>"]
    folder = directory / "tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(letters)}))
    (folder / "merges.txt").write_text("t h\nth e\n")
    return models.load_tokenizer(folder)


def test_another_reader_finds_what_was_written(run, base, tmp_path):
    gguf = pytest.importorskip("gguf")
    export(run, tmp_path / "m.gguf", "--format", "gguf", "--gguf-type", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {
        key: field.contents() for key, field in reader.fields.items() if "tokens" not in key and "merges" not in key
    }
    config, tokenizer = models.load(base).config, models.load_tokenizer(base)
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == 7
    assert fields["llama.attention.head_count_kv"] == config.num_key_value_heads
    assert fields["llama.vocab_size"] == config.vocab_size
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in tensors  # the head is the embedding
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"Q8_0"}
    up = tensors["blk.0.ffn_up.weight"]
    values = torch.from_numpy(np.array(gguf.dequantize(up.data, up.tensor_type)))
    wanted = weight_of(as_run(run, base), "model.layers.0.mlp.up_proj.weight")
    assert bool(((values - wanted).abs() <= rounding(wanted, "q8_0")).all())
    assert tensors["blk.0.ffn_up.weight"].shape.tolist() == [64, 128]


def test_a_file_that_differs_is_not_kept(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("models.gguf_writer.interleaved_order", lambda rows, heads: rows)
    err = told(capsys, run, tmp_path / "m.gguf", "--format", "gguf", code=4)
    assert "q_proj.weight is off by" in err
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("models.gguf_writer.encoded", fails)
    with pytest.raises(OSError, match="No space"):
        export(run, tmp_path / "m.gguf", "--format", "gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_answers_differ_is_refused_though_every_weight_is_right(tmp_path):
    model, tokenizer = (
        causal(models.load(GOLDEN / "llama-gqa", dtype=torch.float32), "a test"),
        small_tokenizer(tmp_path),
    )
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    kinds = {name: "f32" for name, _ in shapes(model)}
    model.head = lambda hidden: Llama.head(model, hidden) * 1.5  # type: ignore[method-assign]
    with pytest.raises(models.CheckpointError, match="answers differ by a KL divergence of"):
        check(tmp_path / "m.gguf", model, tokenizer, kinds)


def test_a_weight_beyond_float16_is_refused_and_named(base, tmp_path, capsys):
    source = shutil.copytree(base, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 70000.0
    save_file(tensors, source / "model.safetensors")
    err = told(capsys, source, tmp_path / "m.gguf", "--format", "gguf", code=4)
    assert "up_proj.weight holds 7e+04, and f16 ends at 6.55e+04; choose --gguf-type f32 or bf16" in err
    export(source, tmp_path / "m.gguf", "--format", "gguf", "--gguf-type", "bf16")


def test_rows_that_no_block_divides_are_stored_in_16_bits():
    assert [stored_as("w", (3, width), "q8_0") for width in (32, 64, 33, 576)] == ["q8_0", "q8_0", "f16", "q8_0"]
    assert {stored_as("w", (3,), kind) for kind in ("f32", "f16", "bf16", "q8_0")} == {"f32"}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_what_a_type_stores_is_within_its_rounding(kind):
    gguf = pytest.importorskip("gguf")
    exponents = torch.randint(-30, 10, (64, 64), generator=torch.Generator().manual_seed(0))
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * 2.0**exponents
    type = gguf.GGMLQuantizationType[kind.upper()]
    stored = encoded(weight, kind, "w")
    found = torch.from_numpy(np.array(gguf.dequantize(stored.view(np.uint8), type))).view(64, 64)
    assert bool(((found - weight).abs() <= rounding(weight, kind)).all())


def test_names_and_row_orders_have_inverses():
    for case in ("llama-gqa", "llama-headdim-bias", "llama3-rope-tied"):
        for name, _ in models.load(GOLDEN / case).named_parameters():
            assert released_name(gguf_name(name)) == name
    rows = torch.randn(24, 5)
    assert torch.equal(interleaved_order(half_rotation_order(rows, 3), 3), rows)
    assert torch.equal(half_rotation_order(interleaved_order(rows[:, 0], 2), 2), rows[:, 0])
    with pytest.raises(ValueError, match="has no name in a GGUF"):
        gguf_name("model.rotary")


# Tokenizers in a GGUF


def sentencepiece_files(directory: Path, kind: str = "bpe", rule: str = "identity") -> Path:
    """A SentencePiece model of the given kind, trained on a few lines."""
    import sentencepiece

    text = ["the quick brown fox", "jumps over the lazy dog", "colours: red, blue, green 123"] * 20
    directory.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        model_type=kind,
        normalization_rule_name=rule,
        remove_extra_whitespaces=False,
    )
    return directory


def with_rows(base, directory, rows):
    """A model with as many rows in its embedding."""
    config = models.config.LlamaConfig(**{**vars(models.load(base).config), "vocab_size": rows})
    model = Llama(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    models.save(model, directory)


def test_a_sentencepiece_tokenizer_comes_back_with_added_tokens_and_empty_rows(base, tmp_path):
    source = sentencepiece_files(tmp_path / "source")
    size = models.load_tokenizer(source).vocab_size
    settings = {"added_tokens_decoder": {str(size + 2): {"content": "<|im_end|>", "special": True}}}
    (source / "tokenizer_config.json").write_text(
        json.dumps(settings | {"eos_token": "<|im_end|>", "chat_template": "{{x}}"})
    )
    with_rows(base, source, size + 9)
    export(source, tmp_path / "m.gguf", "--format", "gguf")
    before, after = models.load_tokenizer(source), models.load_tokenizer(tmp_path / "m.gguf")
    assert after.special_tokens == before.special_tokens
    assert after.vocab_size == before.vocab_size
    for text in ("the quick  fox 123", "Grüße 🦙\n"):
        assert after.encode(text, bos=True, eos=True) == before.encode(text, bos=True, eos=True)


def test_a_tokenizer_that_a_gguf_cannot_hold_is_refused(base, tmp_path, capsys):
    source = sentencepiece_files(tmp_path / "source", "unigram", "nmt_nfkc_cf")
    with_rows(base, source, models.load_tokenizer(source).vocab_size)
    err = told(capsys, source, tmp_path / "m.gguf", "--format", "gguf", code=4)
    assert "the tokenizer gives" in err
    assert not (tmp_path / "m.gguf").exists()


def test_a_tokenizer_of_another_model_is_refused(base, tmp_path, capsys):
    source = sentencepiece_files(tmp_path / "source")
    with_rows(base, source, 100)
    err = told(capsys, source, tmp_path / "m.gguf", "--format", "gguf", code=4)
    assert "but the embedding has 100 rows" in err


def test_merges_follow_from_ranks_where_a_vocabulary_has_none():
    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b"he": 257, b"the": 258, b" the": 259}
    assert merges_of(ranks) == [("t", "h"), ("h", "e"), ("t", "he"), ("th", "e"), ("Ġ", "the")]


def test_a_tokenizer_json_keeps_its_merges(base, tmp_path):
    source = shutil.copytree(base, tmp_path / "source")
    export(source, tmp_path / "m.gguf", "--format", "gguf")
    models.save_tokenizer(models.load_tokenizer(tmp_path / "m.gguf"), tmp_path / "out")
    _, merges, pattern, _ = read_tokenizer_json(json.loads((tmp_path / "out" / "tokenizer.json").read_text()))
    lines = (source / "merges.txt").read_text().splitlines()
    assert [" ".join(pair) for pair in merges] == [line for line in lines if line and not line.startswith("#version")]
    assert pattern == "smollm"


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
