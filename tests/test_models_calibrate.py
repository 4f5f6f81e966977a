"""Calibrated checkpoints: each layer quantized for what the layers before it make of the text, in the usual files."""

import pytest
import torch
from safetensors.torch import load_file

import models
import nf4
from models.calibrate import Calibration, first_call, groups
from models.linear import AdaptableLinear
from models.quantize import quantize_checkpoint
from nf4.calibrated import Method
from tests import tiny, tiny_roberta, tiny_t5

SEARCHED = nf4.QuantConfig(scale="search")
LLAMA_GROUPS = [
    ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    ["self_attn.o_proj.weight"],
    ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    ["mlp.down_proj.weight"],
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("calibrate") / "source")


def windows(vocabulary, count=10, tokens=48):
    """Text in which a few tokens are common, as in any."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(count, tokens, generator=generator).pow(3) * vocabulary
    return ids.long()


def down_projection(model):
    """The last layer of the last block."""
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, AdaptableLinear)
    return layer


def quantized(source, out, method: Method = "feedback", quant=SEARCHED, text=None, asymmetric=True):
    text = windows(models.load_tokenizer(source).vocab_size) if text is None else text
    layers = quantize_checkpoint(source, out, quant, torch.float32, calibration=Calibration(text, method, asymmetric))
    return models.load(out, dtype=torch.float32), {layer.name: layer for layer in layers}


def test_layers_that_read_the_same_input_go_together_in_the_order_of_their_use(source):
    model = models.load(source, dtype=torch.float32)
    block = model.get_submodule("model.layers.0")
    assert groups(block, first_call(model, block, torch.ones(1, 5, dtype=torch.long))) == LLAMA_GROUPS


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_reported_error_is_that_of_outputs_in_the_quantized_model(source, tmp_path, asymmetric):
    """The last layer reads what all others, quantized already, made of the text: so does it in the loaded model."""
    text = windows(models.load_tokenizer(source).vocab_size)
    model, layers = quantized(source, tmp_path / "out", text=text, asymmetric=asymmetric)
    dense = models.load(source, dtype=torch.float32)
    (x, y), (_, wanted) = (read_and_answered(m, text) for m in (model, dense))
    size = (x @ down_projection(dense).dense_weight().T).norm()
    lost = float((wanted - y).norm() / size)
    assert layers["model.layers.1.mlp.down_proj.weight"].output_error == pytest.approx(lost, rel=1e-3)


def read_and_answered(model, text):
    """Inputs and outputs of the last layer."""
    seen = []
    down_projection(model).register_forward_hook(
        lambda _, args, y: seen.append((args[0].flatten(0, 1), y.flatten(0, 1)))
    )
    with torch.inference_mode():
        model(text)
    return seen[0]


def test_the_file_is_an_ordinary_one_that_changes_the_model_less(source, tmp_path):
    text = windows(models.load_tokenizer(source).vocab_size)
    quantize_checkpoint(source, tmp_path / "plain", dtype=torch.float32)
    ours, _ = quantized(source, tmp_path / "feedback")
    weighted, _ = quantized(source, tmp_path / "weighted", "weighted")
    plain = models.load(tmp_path / "plain", dtype=torch.float32)
    dense = models.load(source, dtype=torch.float32)
    with torch.inference_mode():
        losses = [float((m(text) - dense(text)).square().mean()) for m in (ours, weighted, plain)]
    assert losses[0] < 0.8 * losses[2]
    assert losses[1] < losses[2]

    files = [load_file(tmp_path / name / "model.safetensors") for name in ("feedback", "plain")]
    kinds = [{k: (v.dtype, v.shape) for k, v in file.items() if "quant_state" not in k} for file in files]
    assert kinds[0] == kinds[1]
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0] if "proj" not in k)
    configs = [(tmp_path / name / "config.json").read_text() for name in ("feedback", "plain")]
    assert configs[0] == configs[1]


def test_it_comes_out_the_same_again(source, tmp_path):
    for name in ("one", "two"):
        quantized(source, tmp_path / name)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_earlier_layers_did_is_made_up_for_by_later_ones(source, tmp_path):
    _, blind = quantized(source, tmp_path / "blind", asymmetric=False)
    _, aware = quantized(source, tmp_path / "aware", asymmetric=True)
    errors = [[layer.output_error or torch.nan for layer in layers.values()] for layers in (aware, blind)]
    assert sum(errors[0]) < 0.9 * sum(errors[1])
    first = "model.layers.0.self_attn.q_proj.weight"  # before it nothing is quantized
    assert aware[first].output_error == pytest.approx(blind[first].output_error, rel=0.02)


def test_roberta_is_calibrated_with_blocks_that_cross_rows(tmp_path):
    source = tiny_roberta.checkpoint(tmp_path / "source")
    text = torch.randint(4, 20, (8, 30), generator=torch.Generator().manual_seed(0))
    model, layers = quantized(source, tmp_path / "out", quant=nf4.QuantConfig(block_size=40, scale="search"), text=text)
    quantize_checkpoint(source, tmp_path / "plain", nf4.QuantConfig(block_size=40), torch.float32)
    dense, plain = (models.load(path, dtype=torch.float32) for path in (source, tmp_path / "plain"))
    with torch.inference_mode():
        ours, theirs = (float((m(text) - dense(text)).square().mean()) for m in (model, plain))
    assert ours < 0.6 * theirs
    assert len(layers) == 12
    for layer in layers.values():
        assert layer.output_error is not None
        assert layer.output_error < layer.relative_error


def test_a_weight_that_is_no_number_leaves_nothing_behind(source, tmp_path):
    model = models.load(source, dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = torch.nan
    models.save(model, tmp_path / "broken")
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(models.CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is nan at index \(3, 5\)"):
        quantized(tmp_path / "broken", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


def test_what_cannot_be_calibrated_is_refused(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "4-bit")
    with pytest.raises(models.ConfigError, match="in 4 bits already"):
        quantized(tmp_path / "4-bit", tmp_path / "out")
    with pytest.raises(models.DataError, match="127 tokens of text cannot tell how 128 inputs"):
        quantized(source, tmp_path / "out", text=torch.ones(1, 127, dtype=torch.long))
    with pytest.raises(models.ConfigError, match="257 tokens; the model knows 256"):
        quantized(source, tmp_path / "out", text=torch.ones(1, 257, dtype=torch.long))
    with pytest.raises(models.ConfigError, match="T5 is 2 runs of blocks"):
        quantized(tiny_t5.checkpoint(tmp_path / "t5"), tmp_path / "out", text=torch.ones(9, 99, dtype=torch.long))
    assert not (tmp_path / "out").exists()
