"""Loading: the same model from every layout, 4 bits as asked, and one clear refusal for each broken input."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
import nf4
from models.checkpoint import open_checkpoint, stream
from models.linear import Linear, NF4Linear
from tests.golden import GOLDEN, LAYOUTS, layout

SAME = [name for name in LAYOUTS if "headdim" not in name and "rope" not in name]


@pytest.mark.parametrize("name", SAME)
def test_every_layout_holds_the_same_parameters(name, tmp_path):
    expected = dict(models.load(GOLDEN / "llama-gqa", dtype=torch.float32).named_parameters())
    found = dict(models.load(layout(name, tmp_path), dtype=torch.float32).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_file_stands_for_its_checkpoint(file):
    assert models.load(GOLDEN / "llama-gqa" / file).config == models.load(GOLDEN / "llama-gqa").config


def test_the_dtype_is_bfloat16_unless_told():
    model = models.load(GOLDEN / "llama-gqa")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training


@pytest.mark.parametrize("double_quant", [True, False])
def test_block_linears_are_quantized_from_the_cast_weights_and_nothing_else_is(double_quant):
    config = nf4.QuantConfig(double_quant=double_quant)
    weights = load_file(GOLDEN / "llama-gqa" / "model.safetensors")
    model = models.load(GOLDEN / "llama-gqa", config, dtype=torch.bfloat16)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        expected = nf4.quantize(weights[f"{name}.weight"].bfloat16(), config)
        assert torch.equal(layer.quantized.packed, expected.packed)
        assert torch.equal(layer.quantized.scales, expected.scales)
    assert not any(isinstance(m, Linear) for m in model.modules())
    assert model.get_parameter("lm_head.weight").dtype == torch.bfloat16


def test_scales_survive_every_cast_and_codes_every_step():
    model = models.load(GOLDEN / "llama-gqa", nf4.QuantConfig(), dtype=torch.float32)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, NF4Linear)
    before = layer.quantized.scales.clone()
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float()):
        cast(model)
        assert layer.weight.dtype == torch.uint8
        assert torch.equal(layer.quantized.scales, before)
    assert layer.dense_weight().dtype == torch.float32


def test_only_one_tensor_is_read_at_a_time():
    raw, reader, where = open_checkpoint(GOLDEN / "llama-gqa")
    read = []
    original = reader.read
    reader.read = lambda name: read.append(name) or original(name)
    model = models.checkpoint.skeleton(raw, where, reader)
    pieces = stream(model, reader, nf4.QuantConfig(), torch.float32, torch.device("cpu"))
    for count, (name, _, _) in enumerate(pieces, 1):
        assert len(read) == count
        assert read[-1] == name


# Saving


@pytest.mark.parametrize("config", [None, nf4.QuantConfig(), nf4.QuantConfig(codebook="nf3", double_quant=False)])
@pytest.mark.parametrize("name", ["llama-gqa", "llama3-rope-tied", "llama-headdim-bias"])
def test_a_saved_model_comes_back_with_identical_logits(name, config, tmp_path):
    model = models.load(GOLDEN / name, config, dtype=torch.float32)
    models.save(model, tmp_path / "saved", shard_bytes=30_000)
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    again = models.load(tmp_path / "saved", dtype=torch.float32)
    ids = torch.randint(0, 128, (2, 9))
    assert torch.equal(again(ids), model(ids))
    assert again.config == model.config


def test_a_quantized_file_holds_what_bitsandbytes_would_save(tmp_path):
    models.save(models.load(GOLDEN / "llama-gqa", nf4.QuantConfig()), tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert tensors[name].shape == (192 * 64 // 2, 1)
    assert f"{name}.quant_state.bitsandbytes__nf4" in tensors
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is True


def test_saving_again_replaces_and_leaves_no_stale_shard(tmp_path):
    model = models.load(GOLDEN / "llama-gqa")
    models.save(model, tmp_path / "m", shard_bytes=30_000)
    models.save(model, tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    model = models.load(GOLDEN / "llama-gqa")

    def fails(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("models.writer.save_file", fails)
    with pytest.raises(OSError, match="No space"):
        models.save(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_adapters_is_not_saved_without_them(tmp_path):
    model = models.load(GOLDEN / "llama-gqa")
    models.attach_lora(model, models.LoraConfig(rank=2))
    with pytest.raises(ValueError, match=r"14 layers have adapters .* call save_adapter"):
        models.save(model, tmp_path / "m")


def test_an_already_quantized_checkpoint_is_not_quantized_again(tmp_path):
    models.save(models.load(GOLDEN / "llama-gqa", nf4.QuantConfig()), tmp_path / "m")
    assert models.load(tmp_path / "m", nf4.QuantConfig())
    with pytest.raises(models.CheckpointError, match="is already quantized"):
        models.load(tmp_path / "m", nf4.QuantConfig(block_size=32))


# GGUF


def write_gguf(path, tensors, meta=(), architecture="llama"):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    config = json.loads((GOLDEN / "llama-gqa" / "config.json").read_text())
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(192)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for add in meta:
        add(writer)
    for name, (data, kind) in tensors.items():
        if kind is None:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_tensors(kind=None):
    """llama-gqa under GGUF's names, query and key rows in the order of interleaved rotary positions."""
    tensors = {}
    for name, weight in load_file(GOLDEN / "llama-gqa" / "model.safetensors").items():
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        if heads:
            weight = weight.view(heads, 2, -1, 64).transpose(1, 2).reshape(weight.shape)
        theirs = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        theirs["lm_head.weight"] = "output.weight"
        if name.startswith("model.layers"):
            _, _, layer, rest = name.split(".", 3)
            theirs[name] = f"blk.{layer}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"
        is_matrix = weight.ndim == 2
        tensors[theirs[name]] = (weight.contiguous().numpy(), kind if is_matrix else None)
    return tensors


def test_a_gguf_in_float32_is_the_same_model(tmp_path):
    write_gguf(tmp_path / "m.gguf", gguf_tensors())
    ids = torch.randint(0, 128, (2, 11))
    expected = models.load(GOLDEN / "llama-gqa", dtype=torch.float32)(ids)
    for path in (tmp_path / "m.gguf", tmp_path):
        torch.testing.assert_close(models.load(path, dtype=torch.float32)(ids), expected)


def test_a_gguf_in_eight_bits_is_close(tmp_path):
    gguf = pytest.importorskip("gguf")
    write_gguf(tmp_path / "m.gguf", gguf_tensors(gguf.GGMLQuantizationType.Q8_0))
    found = models.load(tmp_path / "m.gguf", dtype=torch.float32).get_parameter("model.layers.1.mlp.up_proj.weight")
    weight = load_file(GOLDEN / "llama-gqa" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    step = weight.view(-1, 32).abs().amax(1) / 127
    assert bool(((found - weight).abs().view(-1, 32) <= 0.51 * step[:, None] + 1e-4).all())


def test_a_ggufs_llama3_scaling_is_found_from_its_divisors(tmp_path):
    raw = json.loads((GOLDEN / "llama3-rope-tied" / "config.json").read_text())
    config = models.config.llama_config(raw, "config.json")
    plain = models.config.llama_config({**raw, "rope_parameters": {"rope_theta": 500000.0}}, "plain")
    device = torch.device("cpu")
    divisors = models.rope.inverse_frequencies(plain, device) / models.rope.inverse_frequencies(config, device)
    tensors = gguf_tensors() | {"rope_freqs.weight": (divisors.numpy().astype(np.float32), None)}
    write_gguf(tmp_path / "m.gguf", tensors, [lambda w: w.add_rope_freq_base(500000.0)])
    assert models.load(tmp_path / "m.gguf").config.rope_scaling == config.rope_scaling


def test_a_gguf_of_another_architecture_or_cut_short_is_refused(tmp_path):
    write_gguf(tmp_path / "other.gguf", gguf_tensors(), architecture="llama")
    whole = (tmp_path / "other.gguf").read_bytes()
    (tmp_path / "other.gguf").write_bytes(whole.replace(b"llama", b"mamba"))
    with pytest.raises(models.CheckpointError, match="architecture 'mamba' is not known"):
        models.load(tmp_path / "other.gguf")
    for length in (3, 100, 700, len(whole) - 500):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(models.CheckpointError, match=r"cut\.gguf"):
            models.load(tmp_path / "cut.gguf")


# Refusals


@pytest.fixture
def broken(tmp_path):
    target = tmp_path / "broken"
    shutil.copytree(GOLDEN / "llama-gqa", target)
    return target


def refused(path, message, **kwargs):
    with pytest.raises(models.CheckpointError, match=message):
        models.load(path, **kwargs)


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_a_truncated_safetensors_file_is_refused(broken):
    whole = (broken / "model.safetensors").read_bytes()
    for length in (0, 5, 2000, len(whole) - 4):
        (broken / "model.safetensors").write_bytes(whole[:length])
        refused(broken, r"model\.safetensors: not a whole safetensors file")


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(broken):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra"] = torch.zeros(2)
        tensors["lm_head.weight"] = torch.zeros(128, 63)

    edit(broken, change)
    message = r"1 missing: model\.norm\.weight; 1 unexpected: model\.extra \(in .*\); 1 of another shape: lm_head"
    refused(broken, message)


def test_nan_weights_are_refused_with_name_and_place(broken):
    edit(broken, lambda t: t["model.layers.1.mlp.up_proj.weight"][3].__setitem__(5, float("nan")))
    refused(broken, r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity at \[3, 5\]")
    refused(broken, r"up_proj\.weight is nan at index \(3, 5\)", quant=nf4.QuantConfig())


def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    shutil.copy(GOLDEN / "llama-gqa" / "config.json", tmp_path)
    torch.save({"model.norm.weight": Harm()}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "refused, because reading it would run code")
    assert not (tmp_path / "harm").exists()


def test_a_truncated_bin_is_refused(tmp_path):
    source = layout("llama-bin", tmp_path)
    whole = (source / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    refused(source, r"pytorch_model\.bin: (not a whole torch file|refused)")


def test_a_wrong_shard_count_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "llama-raw-2", tmp_path / "raw")
    (tmp_path / "raw" / "consolidated.01.pth").rename(tmp_path / "raw" / "consolidated.02.pth")
    refused(tmp_path / "raw", "numbered from 00 without a gap")
    (tmp_path / "raw" / "consolidated.02.pth").unlink()
    refused(tmp_path / "raw", r"1 part\(s\) hold 32 of the 64 columns .*; 2 parts are needed")


def test_an_index_that_names_a_missing_file_is_refused(tmp_path):
    source = layout("llama-sharded", tmp_path)
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(source, "names 1 of 2 files that are not there: model-00002-of-00002.safetensors")


def test_an_index_may_not_reach_outside_its_directory(tmp_path):
    source = layout("llama-sharded", tmp_path)
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))
    refused(source, "which is not a file beside it")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "mamba"}', "architecture 'mamba' is not known"),
        ("{", "not readable as JSON"),
        ("[]", "holds a list; a JSON object is needed"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(broken, content, message):
    (broken / "config.json").write_text(content)
    refused(broken, message)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    refused(tmp_path, "not a checkpoint; looked for config.json, params.json")
    refused(tmp_path / "absent", "no such file or directory")


def test_a_head_that_the_checkpoint_lacks_is_refused():
    with pytest.raises(ValueError, match="head='classification' does not fit"):
        models.load(GOLDEN / "llama-gqa", head="classification", num_labels=2)
