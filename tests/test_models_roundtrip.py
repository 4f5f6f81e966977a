"""What this project writes, its own reader reads back: every tensor, bit by bit, for all sizes, formats and shards."""

import json

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import models
import nf4
from models.checkpoint import place
from models.config import LlamaConfig, RopeScaling
from models.linear import NF4Linear
from models.llama import Llama
from models.model import Model
from models.quantize import quantize_checkpoint
from nf4.codebook import CODEBOOKS
from tests import tiny

every = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
formats = st.builds(
    nf4.QuantConfig,
    codebook=st.sampled_from(sorted(CODEBOOKS)),
    block_size=st.sampled_from([1, 3, 16, 32, 64, 100, 256, 4096]),
    double_quant=st.booleans(),
    nested_block_size=st.sampled_from([1, 7, 64, 256]),
).filter(lambda quant: quant.double_quant or quant.nested_block_size == 256)  # else no file has a place for it


@st.composite
def recipes(draw):
    """What a LLaMA of odd sizes is made from; checks of types draw random numbers, so none is made in here."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    config = {
        "vocab_size": draw(st.integers(1, 40)),
        "hidden_size": draw(st.integers(1, 33)),
        "intermediate_size": draw(st.integers(1, 33)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 5)),
        "rms_norm_eps": draw(st.floats(1e-8, 1e-3)),
        "rope_theta": draw(st.floats(1.0, 1e7)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "bos_token_id": draw(st.none() | st.integers(0, 9)),
        "eos_token_id": tuple(draw(st.lists(st.integers(0, 9), max_size=3, unique=True))),
    }
    factor = draw(st.none() | st.floats(1.0, 9.0))
    return config, factor, draw(dtypes), draw(st.none() | formats), draw(st.integers(0, 2**31))


def built(recipe):
    """The model with random weights, most of its layers in 4 bits if there is a format."""
    fields, factor, dtype, quant, seed = recipe
    scaling = None if factor is None else RopeScaling(rope_type="linear", factor=factor)
    model = Llama(LlamaConfig(**fields, rope_scaling=scaling))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        weight = torch.randn(parameter.shape, generator=generator).to(dtype)
        chosen = quant is not None and name.endswith("proj.weight") and torch.rand((), generator=generator) > 0.25
        place(model, name, nf4.quantize(weight, quant) if chosen else weight)
    return model.eval()


def tensors(model: Model) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


@every
@given(recipe=recipes(), shard_bytes=st.integers(1, 20_000))
def test_a_model_comes_back_bit_by_bit(tmp_path_factory, recipe, shard_bytes):
    directory = tmp_path_factory.mktemp("saved") / "model"
    model = built(recipe)
    models.save(model, directory, shard_bytes)
    again = models.load(directory, dtype=model.dtype)
    before, after = tensors(model), tensors(again)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    layers = {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    for name, layer in layers.items():
        found = again.get_submodule(name)
        assert isinstance(found, NF4Linear)
        assert found.quant_config == layer.quant_config
        assert torch.equal(found.dense_weight(), layer.dense_weight())
    assert again.config == model.config


@every
@given(recipe=recipes(), shard_bytes=st.integers(1, 20_000))
def test_no_shard_is_larger_than_asked_but_for_a_single_parameter(tmp_path_factory, recipe, shard_bytes):
    directory = tmp_path_factory.mktemp("saved") / "model"
    model = built(recipe)
    models.save(model, directory, shard_bytes)
    for file in directory.glob("*.safetensors"):
        held = load_file(file)
        parameters = {name.partition(".weight.")[0].removesuffix(".weight") for name in held}
        assert sum(t.nbytes for t in held.values()) <= shard_bytes or len(parameters) == 1


@every
@given(recipe=recipes(), dtype=dtypes)
def test_codes_and_scales_are_kept_whatever_dtype_is_asked_for(tmp_path_factory, recipe, dtype):
    directory = tmp_path_factory.mktemp("saved") / "model"
    model = built(recipe)
    models.save(model, directory)
    again = models.load(directory, dtype=dtype)
    assert again.dtype == dtype
    for name, layer in model.named_modules():
        if isinstance(layer, NF4Linear):
            found = again.get_submodule(name)
            assert isinstance(found, NF4Linear)
            assert found.dtype == dtype
            assert torch.equal(found.quantized.packed, layer.quantized.packed)
            assert torch.equal(found.quantized.scales, layer.quantized.scales)
            assert torch.equal(found.dense_weight(), nf4.dequantize(layer.quantized, dtype))


@every
@given(quant=formats, dtype=dtypes)
def test_a_quantized_checkpoint_holds_what_loading_with_that_format_gives(tmp_path_factory, quant, dtype):
    root = tmp_path_factory.mktemp("quantized")
    source = tiny.checkpoint(root / "source")
    quantize_checkpoint(source, root / "out", quant, dtype)
    expected, found = models.load(source, quant, dtype), models.load(root / "out", dtype=dtype)
    before, after = tensors(expected), tensors(found)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@every
@given(recipe=recipes())
def test_the_config_names_every_dense_linear_layer_and_no_other(tmp_path_factory, recipe):
    directory = tmp_path_factory.mktemp("saved") / "model"
    model = built(recipe)
    models.save(model, directory)
    quantized = {name for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    config = json.loads((directory / "config.json").read_text()).get("quantization_config")
    if not quantized:
        assert config is None
        return
    named = set(config["llm_int8_skip_modules" if config["quant_method"] == "bitsandbytes" else "dense_layers"])
    with torch.device("meta"):
        linears = {
            name.removesuffix(".weight") for name, _ in Llama(model.config).named_parameters() if "proj.w" in name
        }
    assert named == linears - quantized | {"lm_head"}


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path):
    model = models.load(tiny.checkpoint(tmp_path / "source"))
    models.attach_lora(model, models.LoraConfig(rank=2))
    models.save_adapter(model, tmp_path / "adapter")
    for directory in ("source", "adapter"):
        assert len({file.stat().st_mode for file in (tmp_path / directory).iterdir()}) == 1


def test_only_formats_that_others_know_are_called_bitsandbytes(tmp_path):
    model = models.load(tiny.checkpoint(tmp_path / "source"))
    for i, (quant, theirs) in enumerate(
        [
            (nf4.QuantConfig(), True),
            (nf4.QuantConfig("fp4", 4096), True),
            (nf4.QuantConfig("nf4", 48), False),
            (nf4.QuantConfig("int4"), False),
            (nf4.QuantConfig(nested_block_size=128), False),
            (nf4.QuantConfig(nested_block_size=128, double_quant=False), True),
        ]
    ):
        quantize_checkpoint(tmp_path / "source", tmp_path / str(i), quant, model.dtype)
        method = json.loads((tmp_path / str(i) / "config.json").read_text())["quantization_config"]["quant_method"]
        assert (method == "bitsandbytes") == theirs
