"""Broken and hostile files, one by one: each is refused with its reason, and nothing is run, awaited or reserved."""

import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
import nf4
import qlora
from tests.golden import GOLDEN, layout


@pytest.fixture
def plain(tmp_path):
    return shutil.copytree(GOLDEN / "llama-gqa", tmp_path / "plain")


@pytest.fixture
def stored(tmp_path):
    models.save(models.load(GOLDEN / "llama-gqa", nf4.QuantConfig()), tmp_path / "stored")
    return tmp_path / "stored"


@pytest.fixture(autouse=True)
def little_memory():
    """Whatever would reserve tens of GiB fails here, and not on the machine of whoever runs the tests."""
    if sys.platform != "linux" or torch.cuda.is_available():  # a GPU's driver reserves more than that by itself
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (48 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(path, message, **kwargs):
    with pytest.raises(models.CheckpointError, match=message):
        models.load(path, **kwargs)


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory, **fields):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))


# config.json


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "head_dim"])
@pytest.mark.parametrize("value", [10**9, 10**12, 10**400, 0, -1, "2", 2.0, True, [2], float("nan")])
def test_a_size_that_no_model_has_is_refused(plain, field, value):
    edit_config(plain, **{field: value})
    refused(plain, "config|does not fit")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; a finite number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_parameters": {"rope_theta": -1.0}}, r"rope_theta is -1\.0"),
        ({"rope_parameters": [1]}, "rope_parameters is .*; an object"),
        ({"rope_parameters": None, "rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0}}, "not above"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; true or false"),
        ({"eos_token_id": [1, [2]]}, r"eos_token_id is \[2\]; a whole number"),
        ({"bos_token_id": 10**30}, "bos_token_id is 1000"),
        ({"model_type": ["llama"]}, r"architecture \['llama'\] is not known"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but there are 21 tensors in all"),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused_by_name(plain, fields, message):
    edit_config(plain, **fields)
    refused(plain, message)


def test_json_nested_a_hundred_thousand_deep_is_refused(plain):
    (plain / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refused(plain, r"config\.json: not readable as JSON")


def test_a_pipe_in_a_files_place_is_not_waited_for(plain):
    for name in ("config.json", "model.safetensors"):
        whole = (plain / name).read_bytes()
        (plain / name).unlink()
        os.mkfifo(plain / name)
        refused(plain, "not a regular file|no weights")
        (plain / name).unlink()
        (plain / name).write_bytes(whole)


# Methods of quantization that are not read


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized with 'gptq', which is not read"),
        ({"quant_method": "awq"}, "quantized with 'awq'"),
        ({"quant_method": "fp8"}, "quantized with 'fp8'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "in 8 bits"),
        ({"bits": 4}, "quantized with None"),
        ([], "quantization_config is"),
    ],
)
def test_another_method_is_refused_by_name(plain, config, message):
    edit_config(plain, quantization_config=config)
    refused(plain, message)


def test_eight_bit_tensors_are_recognised_without_a_config(plain):
    edit(plain, lambda t: t.update({"model.layers.0.mlp.up_proj.SCB": torch.ones(192)}))
    refused(plain, r"up_proj\.SCB belongs to weights of bitsandbytes in 8 bits")


def test_the_tensors_say_what_is_in_4_bits_and_the_config_does_not(plain, stored):
    four_bits = json.loads((stored / "config.json").read_text())["quantization_config"]
    edit_config(plain, quantization_config=four_bits)
    dense, expected = models.load(plain), models.load(GOLDEN / "llama-gqa")
    assert all(torch.equal(dense.get_parameter(n), p) for n, p in expected.named_parameters())

    quantized = models.load(stored)
    config = json.loads((stored / "config.json").read_text())
    del config["quantization_config"]
    (stored / "config.json").write_text(json.dumps(config))
    ids = torch.arange(9)[None]
    assert torch.equal(models.load(stored)(ids), quantized(ids))


# Tensors


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("quant", [None, nf4.QuantConfig()])
def test_a_weight_that_is_no_plain_float_is_refused(plain, dtype, quant):
    name = "model.layers.0.mlp.up_proj.weight"
    edit(plain, lambda t: t.update({name: t[name].to(dtype)}))
    refused(plain, rf"{name} is stored as torch\.\w+; weights are float32", quant=quant)


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "quant_map", "nested_quant_map"])
def test_a_4_bit_weight_with_broken_parts_is_refused_by_part(stored, part):
    name = f"model.layers.0.mlp.up_proj.weight.{part}"
    good = load_file(stored / "model.safetensors")
    for change in (
        lambda t: t.pop(name),
        lambda t: t.update({name: t[name][:-1].clone()}),
        lambda t: t.update({name: t[name].double()}),
        lambda t: t.update({name: torch.full_like(t[name], float("nan"))}) if part != "absmax" else t.pop(name),
    ):
        tensors = dict(good)
        change(tensors)
        save_file(tensors, stored / "model.safetensors")
        refused(stored, r"up_proj\.weight\.(quant_state|" + part + ")")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float8"}, "dtype must be one of"),
        ({"dtype": "__class__"}, "dtype must be one of"),
        ({"shape": [10**9, 10**9]}, "codes of a weight"),
        ({"shape": [64, 192]}, "is .* in its 4-bit record but the config asks for"),
        ({"blocksize": 10**30}, "blocksize must be"),
        ({"quant_type": "fp4"}, "the key says nf4"),
        ({"nested_offset": 1e300}, "nested_offset must be"),
        ("{", "not the JSON"),
    ],
)
def test_a_4_bit_record_that_lies_is_refused(stored, change, message):
    key = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"

    def lie(tensors):
        state = json.loads(bytes(tensors[key].tolist()))
        text = change if isinstance(change, str) else json.dumps({**state, **change})
        tensors[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    edit(stored, lie)
    refused(stored, message)


def test_a_4_bit_weight_without_its_codes_or_its_record_is_refused(stored):
    name = "model.layers.0.mlp.up_proj.weight"
    good = load_file(stored / "model.safetensors")
    for lost, message in ((name, f"missing: {name}"), (f"{name}.quant_state.bitsandbytes__nf4", "unexpected")):
        save_file({n: t for n, t in good.items() if n != lost}, stored / "model.safetensors")
        refused(stored, message)


# Containers


def header(length, text):
    return struct.pack("<Q", length) + text


@pytest.mark.parametrize(
    "data",
    [
        header(2**63, b"{}"),
        header(2**40, b"{}"),
        header(100, b'{"a": 1}'),
        header(54, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        header(56, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}  ') + bytes(4),
        header(56, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}  ') + bytes(8),
        header(60, b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}     ') + bytes(4),
        header(72, b'{"a":{"dtype":"F32","shape":[4294967296,4294967297],"data_offsets":[0,4]}}'[:72]) + bytes(4),
        header(56, b'{"a":{"dtype":"X99","shape":[1],"data_offsets":[0,4]}}  ') + bytes(4),
        header(2, b"[]"),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(plain, data):
    (plain / "model.safetensors").write_bytes(data)
    refused(plain, r"model\.safetensors: not a whole safetensors file")


class Harm:
    """Runs code when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_in_both_of_torchs_formats(tmp_path, file, zipped):
    shutil.copy(GOLDEN / "llama-gqa" / "config.json", tmp_path)
    if file.endswith(".pth"):
        (tmp_path / "config.json").unlink()
        shutil.copy(GOLDEN / "llama-raw-2" / "params.json", tmp_path)
    harm = {"model.norm.weight": Harm(tmp_path / "harm")}
    torch.save(harm, tmp_path / file, _use_new_zipfile_serialization=zipped)
    refused(tmp_path, "refused, because reading it would run code")
    assert not (tmp_path / "harm").exists()


def test_a_bare_pickle_is_not_run_either(tmp_path):
    shutil.copy(GOLDEN / "llama-gqa" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Harm(tmp_path / "harm")}))
    refused(tmp_path, "refused|not a whole torch file")
    assert not (tmp_path / "harm").exists()


def torch_file(directory, tensors, **kwargs):
    shutil.copy(GOLDEN / "llama-gqa" / "config.json", directory)
    torch.save(tensors, directory / "pytorch_model.bin", **kwargs)
    return directory


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1).expand(10**6, 10**6), "claims .* numbers but brings fewer"),
        (torch.zeros(3, 3).to_sparse(), "a tensor of an unusual kind"),
        (torch.zeros(3, device="meta"), "a tensor of an unusual kind"),
        ({"nested": torch.zeros(3)}, "is not a tensor but a dict"),
        (3, "is not a tensor but a int"),
    ],
)
def test_a_torch_file_with_anything_but_plain_tensors_is_refused(tmp_path, value, message):
    refused(torch_file(tmp_path, {"model.norm.weight": value}), message)
    refused(torch_file(tmp_path, {7: torch.zeros(1)}), "7 is not a tensor under a name")
    refused(torch_file(tmp_path, [torch.zeros(1)]), "holds a list")


def test_one_storage_under_a_thousand_names_is_refused(tmp_path):
    shared = torch.zeros(1000, 1000)
    refused(torch_file(tmp_path, {f"w{i}": shared for i in range(1000)}), "tensors of .* bytes")


def test_a_zip_bomb_in_a_torch_files_place_is_refused(tmp_path):
    shutil.copy(GOLDEN / "llama-gqa" / "config.json", tmp_path)
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
        archive.writestr("archive/version", "3\n")
    refused(tmp_path, "claims to unpack to 50000002 bytes")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/hostname", "", ".", "..", "a/b", "x" * 300, "\ud800", "a\0b", "sub"]
)
def test_an_index_names_files_beside_it_and_nothing_else(tmp_path, name):
    source = layout("llama-sharded", tmp_path)
    (source / "sub").mkdir()
    index = source / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(table))
    refused(source, "which is not a file beside it|that are not there")


@pytest.mark.parametrize("table", [None, [], {}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": "x"}])
def test_an_index_without_a_table_is_refused(tmp_path, table):
    source = layout("llama-sharded", tmp_path)
    (source / "model.safetensors.index.json").write_text(json.dumps(table))
    refused(source, "has no weight_map|a JSON object is needed")


def test_a_tensor_in_two_shards_or_in_another_than_said_is_refused(tmp_path):
    source = layout("llama-sharded", tmp_path)
    first, second = (source / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    tensors = load_file(first)
    save_file(load_file(second) | dict([next(iter(tensors.items()))]), second)
    refused(source, "is also in")
    shutil.copy(first, second)
    refused(source, "is also in")


# GGUF


def gguf(path, *, pairs=b"", pair_count=None, tensors=b"", tensor_count=0, version=3):
    count = pair_count if pair_count is not None else 0
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, tensor_count, count) + pairs + tensors)
    return path


def string(text):
    return struct.pack("<Q", len(text)) + text


def test_a_gguf_whose_counts_lie_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    refused(gguf(path, pair_count=2**62), "exceeds the file's")
    refused(gguf(path, tensor_count=2**62), "exceeds the file's")
    refused(gguf(path, pair_count=1, pairs=struct.pack("<Q", 2**60)), "exceeds the file's|ends early")
    array = string(b"k") + struct.pack("<IIQ", 9, 4, 2**61)
    refused(gguf(path, pair_count=1, pairs=array), "exceeds the file's")
    nested = string(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
    refused(gguf(path, pair_count=1, pairs=nested + bytes(10_000)), "arrays within arrays")
    twice = (string(b"k") + struct.pack("<II", 4, 1)) * 2
    refused(gguf(path, pair_count=2, pairs=twice), "'k' comes twice")
    architecture = string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")
    record = string(b"token_embd.weight") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)
    refused(gguf(path, pair_count=1, pairs=architecture, tensor_count=1, tensors=record), "ends before token_embd")
    refused(gguf(path, version=99), "GGUF version 99")


def test_a_gguf_whose_tensors_lie_on_each_other_is_refused(tmp_path):
    pytest.importorskip("gguf")
    records = b"".join(string(name) + struct.pack("<IQIQ", 1, 64, 0, 0) for name in (b"a", b"b"))
    path = gguf(tmp_path / "m.gguf", tensor_count=2, tensors=records + bytes(400))
    refused(path, "b lies on a")


# Adapters


@pytest.fixture
def adapter(tmp_path):
    return shutil.copytree(GOLDEN / "lora", tmp_path / "adapter")


def adapter_refused(adapter, message):
    model = models.load(GOLDEN / "llama-gqa", dtype=torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(models.CheckpointError, match=message):
        models.load_adapter(model, adapter)
    assert all(torch.equal(p, before.pop(name)) for name, p in model.named_parameters())
    assert not before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 10**9}, "the adapter is for another model"),
        ({"r": 10**400}, "the adapter is for another model|not a usable"),
        ({"r": "8"}, "not a usable LoRA configuration"),
        ({"r": -8}, "a rank is a whole number of at least 1"),
        ({"rank_pattern": {"q_proj": 10**9}}, "the adapter is for another model"),
        ({"rank_pattern": [1]}, "not a usable LoRA configuration"),
        ({"rank_pattern": {"(": 8}}, "not a usable|not a regular expression"),
        ({"lora_alpha": float("nan")}, "an alpha is a finite number"),
        ({"lora_alpha": "16"}, "not a usable"),
        ({"lora_alpha": 10**400}, "not a usable"),
        ({"lora_dropout": 2}, "dropout is 2"),
        ({"peft_type": ["LORA"]}, "peft_type is"),
        ({"target_modules": ["x"]}, "no layer is called x"),
        ({"modules_to_save": 3}, "a list of names is needed"),
        ({"modules_to_save": ["lm_head"]}, "lacks lm_head.weight"),
    ],
)
def test_an_adapter_with_an_impossible_configuration_is_refused(adapter, fields, message):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    adapter_refused(adapter, message)


@pytest.mark.parametrize("pattern", ["([a-z._0-9]+)+X", "([a-z]|[a-z_.0-9])*X", ".*.*.*.*.*.*.*.*.*X", "a" * 5000])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_be_matched_for_ever_is_refused(adapter, field, pattern):
    config = json.loads((adapter / "adapter_config.json").read_text())
    value = {pattern: 8} if field.endswith("pattern") else pattern
    (adapter / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it was still matching after two seconds"))
    signal.alarm(2)
    try:
        adapter_refused(adapter, "is not a pattern that is tried here")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("layers", ["([a-z]+)+X", ["([a-z]+)+X"]])
def test_a_pattern_for_the_layers_is_no_exception(adapter, layers):
    config = json.loads((adapter / "adapter_config.json").read_text())
    changed = {**config, "layers_to_transform": [0], "layers_pattern": layers}
    (adapter / "adapter_config.json").write_text(json.dumps(changed))
    adapter_refused(adapter, "is not a pattern that is tried here")


def test_an_adapter_of_another_model_or_without_numbers_is_refused(adapter):
    good = load_file(adapter / "adapter_model.safetensors")
    first = next(iter(good))
    cases = {
        "holds NaN or infinity": {first: torch.full_like(good[first], float("nan"))},
        "holds torch.int32": {first: good[first].int()},
        "which this model has no place for": {"base_model.model.x.lora_A.weight": torch.ones(8, 64)},
        "expected": {first: good[first][:, :-1].contiguous()},
    }
    for message, change in cases.items():
        save_file(good | change, adapter / "adapter_model.safetensors")
        adapter_refused(adapter, message)
    save_file({n: t for n, t in good.items() if n != first}, adapter / "adapter_model.safetensors")
    adapter_refused(adapter, "lacks")
    (adapter / "adapter_config.json").write_text("[" * 100_000)
    adapter_refused(adapter, "not readable as JSON")
    (adapter / "adapter_model.safetensors").write_bytes(header(2**63, b"{}"))
    adapter_refused(adapter, "not a whole safetensors file")


# The command line


def test_every_refusal_has_the_exit_code_of_checkpoints(plain, capsys):
    edit_config(plain, num_hidden_layers=10**9)
    assert qlora.main(["generate", str(plain), "--prompt", "x"]) == 4
    assert "num_hidden_layers is 1000000000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [("model = ", "not a run's settings"), ("x = 1", "does not say which model"), ('model = "m"\nquant = 3', "4-bit")],
)
def test_a_run_with_broken_settings_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "config.toml").write_text(text)
    assert qlora.main(["generate", str(tmp_path), "--prompt", "x"]) == 4
    assert message in capsys.readouterr().err
