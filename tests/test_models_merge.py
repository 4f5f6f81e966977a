"""Merging: what is written, that it is what the model with its adapter does, and what happens where it is not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize

import models
import models.merging
import nf4
import qlora
from models.attachment import adapted_layers
from models.compare import answers, compare, random_probe
from models.lazy import load_lazily
from models.linear import AdaptableLinear, NF4Linear
from models.merge import byte_count, in_float32
from models.merging import merge_checkpoint
from models.writer import CheckpointWriter
from tests import tiny
from tests.golden import GOLDEN

BASE = GOLDEN / "llama-gqa"
TIED = GOLDEN / "llama3-rope-tied"
BIASED = GOLDEN / "llama-headdim-bias"


def adapted(source=BASE, quant: nf4.QuantConfig | None = nf4.QuantConfig(), std=0.1, dtype=torch.bfloat16):
    """A checkpoint in 4 bits, with adapters that do something."""
    torch.manual_seed(0)
    model = models.load(source, quant, dtype)
    models.attach_lora(model, models.LoraConfig(rank=4, alpha=8.0))
    for _, layer in adapted_layers(model):
        assert layer.lora_B is not None
        torch.nn.init.normal_(layer.lora_B.weight, std=std)
    return model.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    models.save_adapter(adapted(model, dtype=torch.float32), directory)
    return directory


def delta(layer: AdaptableLinear):
    """What the adapter adds to the weight."""
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    return layer.scaling * (layer.lora_B.weight @ layer.lora_A.weight)


def base_of(layer: AdaptableLinear):
    return nf4.dequantize(layer.quantized, torch.float32) if isinstance(layer, NF4Linear) else layer.weight.float()


def layer_of(model, name: str) -> AdaptableLinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, AdaptableLinear)
    return layer


def merge(*arguments, code=0):
    assert qlora.main(["merge", *map(str, arguments)]) == code


# What is written


@pytest.mark.parametrize("source", [BASE, TIED, BIASED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tensor_is_the_merged_one_rounded_once(source, dtype, tmp_path):
    model = adapted(source)
    merge_checkpoint(model, tmp_path / "m", dtype=dtype)
    written = load_file(tmp_path / "m" / "model.safetensors")
    expected = model.float()
    models.merge_adapter(expected)
    assert written.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert torch.equal(written[name], parameter.detach().to(dtype)), name


@pytest.mark.parametrize("quant", [None, nf4.QuantConfig()])
def test_a_merged_layer_is_its_base_and_the_product_of_its_adapter(quant, tmp_path):
    model = adapted(quant=quant)
    merge_checkpoint(model, tmp_path / "m", dtype=torch.float16)
    layer = layer_of(model, "model.layers.1.mlp.down_proj")
    assert layer.scaling == 2.0  # alpha / rank
    expected = base_of(layer) + delta(layer)
    written = load_file(tmp_path / "m" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(written, expected.half())


def test_with_a_base_the_weights_are_the_original_ones_and_the_adapters_are_added(tmp_path):
    model, original = adapted(), load_file(BASE / "model.safetensors")
    merge_checkpoint(model, tmp_path / "m", base=BASE)
    written = load_file(tmp_path / "m" / "model.safetensors")
    layers = dict(adapted_layers(model))
    assert written.keys() == original.keys()
    for name, weight in original.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None:
            weight = weight + delta(layer)
        assert torch.equal(written[name], weight.bfloat16()), name


def test_a_module_that_was_trained_whole_comes_from_the_adapter_and_not_from_the_base(tmp_path):
    model = adapted()
    head = model.get_parameter("lm_head.weight")
    head.requires_grad_()
    with torch.no_grad():
        head.add_(1.0)
    merge_checkpoint(model, tmp_path / "m", base=BASE)
    assert torch.equal(load_file(tmp_path / "m" / "model.safetensors")["lm_head.weight"], head)


def test_what_is_trained_in_a_wider_dtype_is_merged_and_compared_as_the_model_computes_with_it(tmp_path):
    class Rounded(torch.nn.Module):
        def forward(self, wide):
            return wide.bfloat16()

    model = adapted()
    wide = model.get_parameter("lm_head.weight").float() + 1e-4
    head = model.get_submodule("lm_head")
    head.weight = torch.nn.Parameter(wide)
    parametrize.register_parametrization(head, "weight", Rounded(), unsafe=True)
    merge_checkpoint(model, tmp_path / "m", dtype=torch.float16)
    written = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], wide.bfloat16().half())
    assert not any("parametrizations" in name for name in written)
    settled = in_float32(model)
    assert torch.equal(settled.get_parameter("lm_head.weight"), wide.bfloat16().float())
    assert settled(torch.arange(4)[None]).dtype == torch.float32


@pytest.mark.parametrize(
    "source", ["t5-v1_0", "t5-v1_1", "roberta-mlm", "roberta-classify", "roberta-fairseq/model.pt"]
)
def test_every_architecture_is_merged_and_answers_alike(source, tmp_path):
    model = adapted(GOLDEN / source)
    report = merge_checkpoint(model, tmp_path / "m")
    probe = random_probe(model)
    before, after = answers(in_float32(model), probe), answers(load_lazily(tmp_path / "m", torch.float32), probe)
    found = compare(before, after)
    assert len(report) == len(list(adapted_layers(model)))
    assert 0 < found.mean_kl < 1e-3
    assert found.positions == (4 if "classify" in source else probe.numel())
    torch.testing.assert_close(after, answers(models.load(tmp_path / "m", dtype=torch.float32), probe))


VARIANTS = {
    "dora": models.LoraConfig(rank=4, alpha=8.0, dora=True),
    "pissa": models.LoraConfig(rank=4, alpha=8.0, init="pissa"),
    "loftq": models.LoraConfig(rank=4, alpha=8.0, init="loftq", rslora=True),
    "whole": models.LoraConfig(rank=4, alpha=8.0, modules_to_save=("lm_head", "norm")),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_a_saved_adapter_is_merged_into_the_base_that_it_fits(variant, tmp_path):
    torch.manual_seed(0)
    model = models.load(BASE, nf4.QuantConfig())
    models.attach_lora(model, VARIANTS[variant])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    models.save_adapter(model, tmp_path / "adapter")
    again = models.load(BASE, nf4.QuantConfig())
    models.load_adapter(again, tmp_path / "adapter")
    report = merge_checkpoint(again.eval(), tmp_path / "m")
    probe = random_probe(again)
    found = compare(answers(in_float32(again), probe), answers(load_lazily(tmp_path / "m", torch.float32), probe))
    assert 0 < found.mean_kl < 1e-4
    known = {layer.noise is not None for layer in report}
    assert known == {variant in ("dora", "whole")}  # the other two changed the base


def test_shards_are_of_the_size_asked_and_hold_the_same_tensors(tmp_path):
    model = adapted()
    merge_checkpoint(model, tmp_path / "one")
    merge_checkpoint(model, tmp_path / "many", shard_bytes=40_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 45_000 for file in files)
    one, many = (dict(models.load(tmp_path / name).named_parameters()) for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == one.keys()


def test_no_more_than_a_shard_waits_and_only_one_layer_is_decoded_at_a_time(tmp_path, monkeypatch):
    waiting, decoded, limit = [], [], 40_000
    add, dequantize = CheckpointWriter.add, models.merging.kernels.dequantize

    def watched(writer, name, value):
        add(writer, name, value)
        waiting.append(sum(t.nbytes for t in writer.pending.values()))
        assert len(decoded) <= 1
        decoded.clear()

    monkeypatch.setattr(CheckpointWriter, "add", watched)
    monkeypatch.setattr(models.merging.kernels, "dequantize", lambda *a: decoded.append(a) or dequantize(*a))
    model = adapted()
    model.source = None  # else the noise decodes a layer once more
    merge_checkpoint(model, tmp_path / "m", shard_bytes=limit)
    assert len(waiting) == 21
    assert max(waiting) <= limit


def test_the_account_of_a_layer_is_that_of_its_definition(tmp_path):
    model = adapted()
    report = {layer.name: layer for layer in merge_checkpoint(model, tmp_path / "m")}
    original = load_file(BASE / "model.safetensors")
    assert len(report) == 14
    for name, layer in adapted_layers(model):
        decoded, found = base_of(layer), report[name]
        assert found.noise is not None
        assert found.rank == 4
        assert found.signal == pytest.approx(delta(layer).norm().item(), rel=1e-4)
        assert found.weight == pytest.approx(decoded.norm().item(), rel=1e-4)
        assert found.noise == pytest.approx((original[f"{name}.weight"] - decoded).norm().item(), rel=1e-4)
        assert found.ratio == pytest.approx(found.signal / found.noise)
        assert found.relative == pytest.approx(found.signal / found.weight)


def test_without_an_original_the_noise_is_not_known_unless_a_base_is_named(tmp_path):
    models.save(models.load(BASE, nf4.QuantConfig()), tmp_path / "q")
    model = adapted(tmp_path / "q", None)
    assert {layer.noise for layer in merge_checkpoint(model, tmp_path / "a")} == {None}
    again = merge_checkpoint(model, tmp_path / "b", base=BASE)
    assert all(layer.noise is not None and layer.noise > 0 for layer in again)


# The command


def test_the_command_merges_a_run_and_finds_it_the_same(model, tmp_path, capsys):
    data = tiny.records(tmp_path / "colours.jsonl")
    run = tmp_path / "run"
    flags = "--max-steps 3 --batch-size 2 --lora.rank 4 --data.max-len 96 --optimizer.learning-rate 1e-2 --quiet"
    train = ["train", "--model", str(model), "--data.path", str(data), "--out", str(run), *flags.split()]
    assert qlora.main(train) == 0
    assert "embeddings:" in capsys.readouterr().out  # what stays in 16 bits is said before training
    merge(run, tmp_path / "m", "--shard-size", "100KB", "--json")
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["within"]
    assert 0 < found["comparison"]["mean_kl"] < 1e-3
    assert found["comparison"]["positions"] == 512
    assert len(found["layers"]) == 14
    assert "KL divergence" in captured.err
    assert "norms:" in captured.err
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    merged, tokenizer = models.load(tmp_path / "m"), models.load_tokenizer(tmp_path / "m")
    assert merged.dtype == torch.bfloat16
    assert tokenizer.encode("It is red.") == models.load_tokenizer(model).encode("It is red.")


def test_the_command_takes_a_checkpoint_with_an_adapter_a_base_and_a_text(model, adapter, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("It is red and small. " * 30)
    flags = ["--load.adapter", adapter, "--load.quantize", "True", "--base", model, "--text", text, "--json"]
    merge(model, tmp_path / "m", *flags, "--dtype", "float16")
    found = json.loads(capsys.readouterr().out)
    assert found["base"] == str(model)
    assert found["probe"] == str(text)
    assert found["max_kl"] == 1.0
    assert found["comparison"]["mean_kl"] > 1e-5  # the quantization error shows
    assert models.load(tmp_path / "m", dtype=torch.float16).config.vocab_size == models.load(model).config.vocab_size


def test_a_checkpoint_that_is_not_quantized_has_no_noise(model, adapter, tmp_path, capsys):
    merge(model, tmp_path / "m", "--load.adapter", adapter)
    assert "the base is not quantized" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_wrong_merge_is_found_kept_and_ends_with_exit_code_4(model, adapter, tmp_path, capsys, monkeypatch):
    right = models.merging.merged

    def wrong(base, layer):
        return right(base, layer) * (0.5 if layer.out_features == 128 else 1.0)

    monkeypatch.setattr(models.merging, "merged", wrong)
    merge(model, tmp_path / "m", "--load.adapter", adapter, "--json", code=4)
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert not found["within"]
    assert found["comparison"]["mean_kl"] > found["max_kl"] == 0.002
    assert f"The files are kept in {tmp_path / 'm'}" in captured.err
    assert models.load(tmp_path / "m")


def test_a_merge_that_is_not_finite_is_never_within_tolerance(model, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("models.merge.answers", lambda *_: torch.full((2, 3), float("nan")))
    merge(model, tmp_path / "m", "--load.adapter", adapter, "--max-kl", "100", "--json", code=4)
    assert json.loads(capsys.readouterr().out)["comparison"]["mean_kl"] is None


def test_the_bound_is_the_users(model, adapter, tmp_path, capsys):
    merge(model, tmp_path / "m", "--load.adapter", adapter, "--max-kl", "0", code=4)
    assert "--max-kl allows 0" in capsys.readouterr().err


@pytest.mark.parametrize("failing", ["models.writer.save_file", "models.merging.save_tokenizer"])
def test_a_failure_on_the_way_leaves_nothing(failing, tmp_path, monkeypatch):
    def fails(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(failing, fails)
    with pytest.raises(OSError, match="No space"):
        merge_checkpoint(adapted(), tmp_path / "m", tokenizer=models.load_tokenizer(tiny.TOKENIZER))
    assert list(tmp_path.iterdir()) == []


# Refusals


def refused(capsys, message, *arguments, code=4):
    merge(*arguments, code=code)
    assert message in capsys.readouterr().err


def test_a_place_that_is_taken_is_refused_before_anything_is_loaded(model, adapter, tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").touch()
    refused(capsys, "already holds notes.txt", model, tmp_path / "m", "--load.adapter", adapter, code=2)
    refused(capsys, "is a file", model, tmp_path / "m" / "notes.txt", "--load.adapter", adapter, code=2)


def test_a_target_without_an_adapter_is_refused(model, tmp_path, capsys):
    refused(capsys, "no adapter to merge", model, tmp_path / "m")
    with pytest.raises(models.CheckpointError, match="has no adapter"):
        merge_checkpoint(models.load(BASE), tmp_path / "m")


def test_a_base_that_is_quantized_of_other_shapes_or_another_architecture_is_refused(tmp_path):
    model = adapted()
    models.save(models.load(BASE, nf4.QuantConfig()), tmp_path / "q")
    with pytest.raises(models.CheckpointError, match=r"down_proj\.weight is quantized \(uint8\)"):
        merge_checkpoint(model, tmp_path / "m", base=tmp_path / "q")
    with pytest.raises(models.CheckpointError, match=r"1 missing: lm_head\.weight"):
        merge_checkpoint(model, tmp_path / "m", base=TIED)
    shutil.copytree(BASE, tmp_path / "other")
    tensors = load_file(BASE / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.ones(63)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(models.CheckpointError, match=r"1 of another shape: model\.norm\.weight \[63\]"):
        merge_checkpoint(model, tmp_path / "m", base=tmp_path / "other")
    config = json.loads((BASE / "config.json").read_text()) | {"model_type": "t5"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(models.CheckpointError, match="the base is 't5', but the adapter is for 'llama'"):
        merge_checkpoint(model, tmp_path / "m", base=tmp_path / "other")
    assert not (tmp_path / "m").exists()


def test_an_adapter_that_took_something_out_of_its_base_is_merged_into_no_other(tmp_path):
    model = adapted()
    for _, layer in adapted_layers(model):
        layer.lora_config = models.LoraConfig(init="pissa")
    assert {layer.noise for layer in merge_checkpoint(model, tmp_path / "m")} == {None}
    with pytest.raises(models.CheckpointError, match="fits no other"):
        merge_checkpoint(model, tmp_path / "n", base=BASE)


def test_weights_beyond_float16_are_refused(tmp_path):
    model = adapted()
    layer_of(model, "model.layers.0.mlp.up_proj").scaling = 1e7
    with pytest.raises(models.CheckpointError, match=r"up_proj\.weight has no finite values as torch\.float16"):
        merge_checkpoint(model, tmp_path / "m", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    merge_checkpoint(model, tmp_path / "m")


@pytest.mark.parametrize(
    ("text", "count"), [("500MB", 500_000_000), ("2GiB", 2**31), (" 1.5 kib ", 1536), ("4096", 4096)]
)
def test_a_size_is_read_with_its_unit(text, count):
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "0", "-1MB", "4 parsecs", "GB"])
def test_what_is_no_size_is_refused(text, capsys):
    with pytest.raises(models.ConfigError, match="give a size such as 500MB"):
        byte_count(text)


def test_a_negative_bound_and_an_unreadable_text_are_refused(model, adapter, tmp_path, capsys):
    refused(capsys, "a divergence is at least 0", model, tmp_path / "m", "--max-kl", "-1", code=2)
    text = ("--load.adapter", adapter, "--text")
    refused(capsys, "not readable as UTF-8", model, tmp_path / "m", *text, tmp_path / "absent", code=3)
    (tmp_path / "empty").write_text("")
    refused(capsys, "is empty", model, tmp_path / "m", *text, tmp_path / "empty", code=3)
    assert not (tmp_path / "m").exists()


# From the command line, on what files may lack


@pytest.mark.parametrize("name", ["llama-gqa", "t5-v1_0", "roberta-mlm", "roberta-fairseq"])
def test_a_checkpoint_without_a_tokenizer_is_quantized_and_exported_without_one(name, tmp_path, capsys, caplog):
    assert qlora.main(["quantize", str(GOLDEN / name), str(tmp_path / "nf4"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"]
    assert qlora.main(["export", str(GOLDEN / name), str(tmp_path / "others"), "--format", "nf4", "--json"]) == 0
    assert "No tokenizer is written either" in caplog.text
    assert type(models.load(tmp_path / "nf4")) is type(models.load(tmp_path / "others"))


def test_an_adapter_that_brings_its_head_is_merged_into_a_base_without_one(tmp_path, capsys):
    """As microsoft/LoRA's files for RoBERTa do."""
    torch.manual_seed(0)
    model = models.load(GOLDEN / "roberta-mlm", dtype=torch.float32, head="classification", num_labels=3)
    models.attach_lora(model, models.LoraConfig(rank=2, modules_to_save=("classifier",)))
    for _, layer in adapted_layers(model):
        assert layer.lora_B is not None
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[name.replace("lora_A.weight", "lora_A").replace("lora_B.weight", "lora_B")] = parameter.detach()
    torch.save(tensors, tmp_path / "adapter.bin")

    arguments = [str(GOLDEN / "roberta-mlm"), str(tmp_path / "merged"), "--load.adapter", str(tmp_path / "adapter.bin")]
    assert qlora.main(["merge", *arguments, "--json"]) == 4  # without the head there is no place for it
    assert "classifier" in capsys.readouterr().err
    head = ["--load.head", "classification", "--load.num-labels", "3"]
    assert qlora.main(["merge", *arguments, *head, "--json"]) == 0
    merged = models.load(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(5, 15).view(1, 10)
    fresh = models.load(GOLDEN / "roberta-mlm", dtype=torch.float32, head="classification", num_labels=3)
    models.load_adapter(fresh, tmp_path / "adapter.bin")
    torch.testing.assert_close(merged(ids), fresh(ids), atol=2e-2, rtol=0)
