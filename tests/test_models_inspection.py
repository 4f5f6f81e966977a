"""Inspecting: everything that is read here says what it is, from headers alone, and nothing else passes for it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
import nf4
import qlora
from models.adapter_norms import AdapterLayer, Settings, product_norm
from models.inspection_tables import by_block
from models.linear import AdaptableLinear
from models.readers import SafetensorsReader, TorchReader
from tests import tiny
from tests.golden import GOLDEN, LAYOUTS, layout
from tests.test_models_checkpoint import gguf_tensors, write_gguf


def inspected(capsys, *arguments, code=0):
    """What the command prints as JSON."""
    assert qlora.main(["inspect", *map(str, arguments), "--json"]) == code
    captured = capsys.readouterr()
    return json.loads(captured.out) if code == 0 else captured.err


def shown(capsys, *arguments):
    assert qlora.main(["inspect", *map(str, arguments)]) == 0
    return " ".join(capsys.readouterr().out.split())


# Checkpoints


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_told_with_its_counts(name, tmp_path, capsys):
    path = layout(name, tmp_path)
    found = inspected(capsys, path)
    count = sum(p.numel() for p in models.load(path).parameters())
    kinds = {"raw": "Meta's consolidated parts", "bin": "(.bin", "sharded": "2 files", "": "released names"}
    assert next(text for key, text in kinds.items() if key in name) in found["layout"]
    assert found["kind"] == "checkpoint"
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["task"] == "CAUSAL_LM"
    assert found["parameters"] == count
    assert found["bytes"] == 4 * count
    assert found["bits_per_weight"] == 32
    assert found["types"] == {"float32": len(list(models.load(path).parameters()))}
    assert found["quantization"] == []
    assert found["sizes"]["hidden_size"] == 64


@pytest.mark.parametrize(
    ("name", "architecture", "task", "layout"),
    [
        ("t5-v1_0", "T5ForConditionalGeneration", "SEQ_2_SEQ_LM", "released names (.safetensors)"),
        ("roberta-mlm", "RobertaForMaskedLM", None, "released names (.safetensors)"),
        ("roberta-classify", "RobertaForSequenceClassification", "SEQ_CLS", "released names (.safetensors)"),
        ("roberta-fairseq/model.pt", "RobertaForMaskedLM", None, ".pt file with weights and settings"),
    ],
)
def test_every_architecture_is_told_with_its_task(name, architecture, task, layout, capsys):
    found = inspected(capsys, GOLDEN / name)
    assert (found["architecture"], found["task"], found["layout"]) == (architecture, task, layout)
    count = sum(p.numel() for p in models.load(GOLDEN / name).parameters())
    assert found["parameters"] == count
    assert found["bytes"] == 4 * count


def test_a_tensor_under_another_name_is_counted_where_it_belongs(tmp_path, capsys):
    tensors = load_file(GOLDEN / "llama3-rope-tied" / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    (tmp_path / "config.json").write_bytes((GOLDEN / "llama3-rope-tied" / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    parts = {part["name"]: part for part in inspected(capsys, tmp_path)["parts"]}
    assert parts["embeddings"]["nbytes"] == {"float32": 4 * parts["embeddings"]["parameters"]}
    assert "head" not in parts


def test_no_tensor_of_a_dense_checkpoint_is_read(tmp_path, capsys, monkeypatch):
    def read(reader, name):
        raise AssertionError(f"{name} was read")

    for reader in (SafetensorsReader, TorchReader):
        monkeypatch.setattr(reader, "read", read)
    for name in ("llama-gqa", "llama-sharded", "llama-bin", "llama-raw-2"):
        assert inspected(capsys, layout(name, tmp_path))["parameters"] == 115_008


@pytest.mark.parametrize(
    "quant",
    [
        nf4.QuantConfig(),
        nf4.QuantConfig(block_size=128, nested_block_size=64),
        nf4.QuantConfig(codebook="int4", double_quant=False),
    ],
)
def test_a_quantized_checkpoint_tells_its_format_and_not_its_error(quant, tmp_path, capsys):
    models.save(models.load(GOLDEN / "llama-gqa", quant), tmp_path / "q")
    found = inspected(capsys, tmp_path / "q")
    assert found["quantization"] == [
        {
            "codebook": quant.codebook,
            "block_size": quant.block_size,
            "double_quant": quant.double_quant,
            "nested_block_size": quant.nested_block_size if quant.double_quant else None,
            "layers": 14,
            "error": None,
        }
    ]
    parts = {part["name"]: part for part in found["parts"]}
    codes = parts["quantized linears"]["nbytes"][f"{quant.codebook} codes"]
    assert codes == 98_304 // 2
    assert 4 < parts["quantized linears"]["bits_per_weight"] < 4.6
    assert parts["head"]["nbytes"] == {"bfloat16": 2 * 128 * 64}
    text = shown(capsys, tmp_path / "q")
    assert f"14 layers in {quant.codebook}, blocks of {quant.block_size}" in text
    assert "error is not known without the original" in text


def test_only_the_records_of_a_quantized_checkpoint_are_read(tmp_path, capsys, monkeypatch):
    models.save(models.load(GOLDEN / "llama-gqa", nf4.QuantConfig()), tmp_path / "q")
    read, names = SafetensorsReader.read, []
    monkeypatch.setattr(SafetensorsReader, "read", lambda reader, name: names.append(name) or read(reader, name))
    inspected(capsys, tmp_path / "q")
    assert names
    assert all(".quant_state." in name for name in names)


def test_a_gguf_has_a_histogram_of_types_and_their_bits(tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    write_gguf(tmp_path / "m.gguf", gguf_tensors(gguf.GGMLQuantizationType.Q8_0))
    found = inspected(capsys, tmp_path / "m.gguf")
    assert found["layout"] == "GGUF"
    assert found["types"] == {"Q8_0": 16, "F32": 5}
    parts = {part["name"]: part for part in found["parts"]}
    assert parts["block linears"]["bits_per_weight"] == 8.5  # 32 weights in 8 bits and a float16
    assert parts["norms"]["nbytes"] == {"F32": 4 * 5 * 64}
    assert "16 Q8_0, 5 F32" in shown(capsys, tmp_path / "m.gguf")


def test_tensors_are_listed_when_asked(capsys):
    assert "tensors" not in inspected(capsys, GOLDEN / "llama-gqa")
    found = inspected(capsys, GOLDEN / "llama-gqa", "--tensors")
    assert found["tensors"]["lm_head.weight"] == {"shape": [128, 64], "type": "float32"}
    assert "lm_head.weight" in shown(capsys, GOLDEN / "llama-gqa", "--tensors")


def test_a_person_is_told_what_stays_in_16_bits_and_why(capsys):
    text = shown(capsys, GOLDEN / "llama-gqa")
    assert "115,008 parameters in 0.5 MB: 32.000 bits per weight" in text
    assert "norms: 320 weights in float32; one vector each" in text


# Adapters


@pytest.mark.parametrize("name", ["lora", "lora-rslora"])
def test_an_adapter_tells_its_settings_and_the_norms_of_its_layers(name, capsys):
    found = inspected(capsys, GOLDEN / name)
    config = json.loads((GOLDEN / name / "adapter_config.json").read_text())
    tensors = load_file(GOLDEN / name / "adapter_model.safetensors")
    assert found["kind"] == "adapter"
    assert found["layout"] == "PEFT's directory"
    assert found["alpha"] == config["lora_alpha"]
    assert found["parameters"] == sum(t.numel() for t in tensors.values())
    assert found["bytes"] == sum(t.nbytes for t in tensors.values())
    assert found["targets"] == sorted(config["target_modules"])
    assert found["others"] == {}
    assert len(found["layers"]) == len(tensors) // 2
    model = models.load(GOLDEN / "llama-gqa", dtype=torch.float32)
    models.load_adapter(model, GOLDEN / name)
    for layer in found["layers"]:
        a, b = (tensors[f"base_model.model.{layer['name']}.lora_{x}.weight"] for x in "AB")
        adapted = model.get_submodule(layer["name"])
        assert isinstance(adapted, AdaptableLinear)
        assert layer["rank"] == len(a)
        assert layer["scaling"] == adapted.scaling
        assert layer["a"] == pytest.approx(a.norm().item())
        assert layer["b"] == pytest.approx(b.norm().item())
        assert layer["delta"] == pytest.approx((adapted.scaling * b @ a).norm().item())
    assert inspected(capsys, GOLDEN / name / "adapter_model.safetensors") == found
    assert "norm of s B A" in shown(capsys, GOLDEN / name)


def test_microsofts_file_is_an_adapter_whose_alpha_is_not_known(tmp_path, capsys):
    a, b = torch.randn(4, 32), torch.randn(16, 4)
    layers = [f"roberta.encoder.layer.{i}.attention.self.{kind}" for i in (0, 10, 2) for kind in ("query", "value")]
    tensors = {f"{name}.lora_{x}": t for name in layers for x, t in (("A", a), ("B", b))}
    torch.save({**tensors, "classifier.dense.weight": torch.zeros(3, 5)}, tmp_path / "lora_mnli.bin")
    found = inspected(capsys, tmp_path / "lora_mnli.bin")
    assert found["layout"] == "microsoft/LoRA's file"
    assert found["alpha"] is None
    assert found["ranks"] == [4]
    assert found["targets"] == ["query", "value"]
    assert found["others"] == {"classifier.dense.weight": [3, 5]}
    assert all(layer["scaling"] is None for layer in found["layers"])
    assert found["layers"][0]["delta"] == pytest.approx((b @ a).norm().item())
    assert "the norms are without the scaling" in shown(capsys, tmp_path / "lora_mnli.bin")


def test_the_norm_of_a_product_is_found_without_the_product():
    b, a = torch.randn(50, 3), torch.randn(3, 40)
    assert product_norm(b, a) == pytest.approx((b.double() @ a.double()).norm().item(), rel=1e-12)
    assert product_norm(torch.zeros(5, 2), torch.randn(2, 4)) == 0


def test_blocks_come_in_their_order_and_layers_of_one_name_are_told_apart():
    def layers(*names):
        return [AdapterLayer(name, 1, 1.0, 0.0, 0.0, float(i)) for i, name in enumerate(names)]

    found = by_block(
        layers("model.layers.10.mlp.up_proj", "model.layers.9.mlp.up_proj", "model.layers.9.self_attn.q_proj")
    )
    assert list(found) == ["model.layers.9", "model.layers.10"]
    assert list(found["model.layers.9"]) == ["up_proj", "q_proj"]
    block = "decoder.block.0.layer"
    found = by_block(layers(f"{block}.0.SelfAttention.q", f"{block}.1.EncDecAttention.q"))
    assert {kind: layer.delta for kind, layer in found["decoder.block.0"].items()} == {
        "SelfAttention.q": 0.0,
        "EncDecAttention.q": 1.0,
    }
    block = "roberta.encoder.layer.0"
    found = by_block(layers(f"{block}.output.dense", f"{block}.attention.output.dense"))
    assert list(found[block]) == ["output.dense", "attention.output.dense"]
    assert list(by_block(layers("dense"))) == [""]


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model, data = tiny.checkpoint(folder / "model"), tiny.records(folder / "colours.jsonl")
    flags = "--max-steps 2 --batch-size 2 --lora.rank 4 --data.max-len 96 --data.eval-size 0.1 --quiet"
    train = ["train", "--model", str(model), "--data.path", str(data), "--out", str(folder / "run"), *flags.split()]
    assert qlora.main(train) == 0
    return folder / "run"


def test_a_run_tells_its_base_its_progress_and_the_norms_of_its_adapters(run, capsys):
    found = inspected(capsys, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found["kind"] == "run"
    assert found["base"] == str(run.parent / "model")
    assert found["base_is_there"]
    assert found["status"] == "done"
    assert found["steps"] == 2
    assert found["loss"] == [line["loss"] for line in lines if line["split"] == "train"][-1]
    assert found["held_out_loss"] == [line["loss"] for line in lines if line["split"] == "eval"][-1]
    assert found["quant"]["codebook"] == "nf4"
    assert len(found["adapter"]["layers"]) == 14
    assert found["adapter"]["ranks"] == [4]
    assert all(math.isfinite(layer["delta"]) and layer["delta"] > 0 for layer in found["adapter"]["layers"])
    text = shown(capsys, run)
    assert "run, done, 2 steps" in text
    assert "norm of s B A in model.layers." in text


def test_a_run_that_was_killed_early_is_told_too(run, tmp_path, capsys):
    (tmp_path / "config.toml").write_bytes((run / "config.toml").read_bytes())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 2.5}\n{"step": 2, "spl')
    found = inspected(capsys, tmp_path)
    assert (found["steps"], found["loss"], found["status"], found["adapter"]) == (1, 2.5, None, None)
    assert "no adapter yet" in shown(capsys, tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1\n{"step": 2, "split": "train", "loss": 2.5}\n')
    assert "metrics.jsonl:1: is damaged" in inspected(capsys, tmp_path, code=4)
    (tmp_path / "config.toml").write_text("model = [")
    assert "config.toml" in inspected(capsys, tmp_path, code=4)


# Refusals


def test_what_is_not_there_or_not_readable_has_one_error_and_exit_code_4(tmp_path, capsys):
    assert "no such file or directory" in inspected(capsys, tmp_path / "absent", code=4)
    assert "not a checkpoint" in inspected(capsys, tmp_path, code=4)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    (tmp_path / "config.json").write_bytes((GOLDEN / "llama-gqa" / "config.json").read_bytes())
    assert "not a whole safetensors file" in inspected(capsys, tmp_path, code=4)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert "m.gguf" in inspected(capsys, tmp_path / "m.gguf", code=4)


def test_a_checkpoint_that_would_not_load_is_refused_with_what_is_wrong(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((GOLDEN / "llama-gqa" / "config.json").read_bytes())
    tensors = load_file(GOLDEN / "llama-gqa" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert "1 missing: model.norm.weight" in inspected(capsys, tmp_path, code=4)


def test_a_damaged_record_of_a_4_bit_weight_is_refused(tmp_path, capsys):
    models.save(models.load(GOLDEN / "llama-gqa", nf4.QuantConfig()), tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    tensors[key] = tensors[key][:-3]
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    assert "not the JSON that tells" in inspected(capsys, tmp_path / "q", code=4)


def test_an_adapter_file_that_is_not_whole_is_refused(tmp_path, capsys):
    config = (GOLDEN / "lora" / "adapter_config.json").read_bytes()
    (tmp_path / "adapter_config.json").write_bytes(config)
    tensors = load_file(GOLDEN / "lora" / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    whole = tensors.pop(name)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert "has only lora_A of its two" in inspected(capsys, tmp_path, code=4)
    save_file({**tensors, name: whole[:, :-1].contiguous()}, tmp_path / "adapter_model.safetensors")
    assert "do not multiply" in inspected(capsys, tmp_path, code=4)
    save_file({"x": whole}, tmp_path / "adapter_model.safetensors")
    assert "holds no adapter" in inspected(capsys, tmp_path, code=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "VERA"}, "peft_type is 'VERA'"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: q_proj is None"),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1]"),
        ({"alpha_pattern": {"(": 1}}, "is not a regular expression"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(change, message, tmp_path, capsys):
    config = json.loads((GOLDEN / "lora" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    (tmp_path / "adapter_model.safetensors").write_bytes((GOLDEN / "lora" / "adapter_model.safetensors").read_bytes())
    assert message in inspected(capsys, tmp_path, code=4)


def test_of_several_alphas_that_fit_the_first_counts():
    settings = Settings(16.0, {"layers.1.mlp.up_proj": 8.0, "up_proj": 4.0}, False, False, True)
    assert settings.scaling("model.layers.1.mlp.up_proj", 4) == 2.0
    assert settings.scaling("model.layers.11.mlp.up_proj", 4) == 1.0
    assert settings.scaling("model.layers.1.self_attn.q_proj", 4) == 4.0


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, capsys):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"layer.lora_A": Harm()}, tmp_path / "lora.bin")
    assert "would run code" in inspected(capsys, tmp_path / "lora.bin", code=4)
    assert not (tmp_path / "harm").exists()


def test_a_safetensors_type_that_torch_lacks_is_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "m.safetensors")
    reader = SafetensorsReader(tmp_path / "m.safetensors")
    assert reader.stored("x") == ("float32", 8)
    reader.types["x"] = "F4"
    with pytest.raises(models.CheckpointError, match="x is of type F4"):
        reader.stored("x")
