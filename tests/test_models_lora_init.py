"""PiSSA and LoftQ: closer to the weight than quantization alone, the same again from the checkpoint, and saved so."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import kernels
import models
import nf4
from models import lora_init
from models.attachment import adapted_layers
from models.linear import AdaptableLinear, Linear, NF4Linear
from models.lora_init import divided, take, triplets
from models.methods import detach
from tests.golden import GOLDEN, layout

IDS = torch.arange(24).view(2, 12) % 128
PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 16}, "alpha_pattern": {"v_proj": 3.0}}
SEARCHED = nf4.QuantConfig(codebook="nf3", block_size=32, double_quant=False, scale="search")


def base(quant=None, dtype=torch.float32, name="llama-gqa"):
    return models.load(GOLDEN / name, quant, dtype=dtype)


def weight_of(model, name):
    layer = model.get_submodule(name)
    assert isinstance(layer, AdaptableLinear)
    return layer.dense_weight().float()


def branch(layer):
    return layer.scaling * (layer.lora_B.weight.detach().float() @ layer.lora_A.weight.detach().float())


def distance(weight, layer):
    return float((weight - layer.dense_weight().float() - branch(layer)).norm())


def move(model):
    """Train, in the cheapest way."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.02)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
@pytest.mark.parametrize("quant", [nf4.QuantConfig(), SEARCHED])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"rank": 4}),
        (torch.bfloat16, {"rank": 8, "alpha": 64.0, "rslora": True, **PATTERNS}),
        (torch.bfloat16, {"rank": 1, "alpha": 0.5, "dtype": "bfloat16", "dora": True}),
    ],
)
def test_base_and_adapter_are_closer_to_each_weight_than_quantization_alone(init, quant, dtype, options):
    dense, plain, model = base(None, dtype), base(quant, dtype), base(quant, dtype)
    models.attach_lora(model, models.LoraConfig(init=init, **options))
    for name, layer in adapted_layers(model):
        weight = weight_of(dense, name)
        alone = float((weight - weight_of(plain, name)).norm())
        assert distance(weight, layer) < alone, name
        assert isinstance(layer, NF4Linear)
        assert layer.quant_config == quant
        assert layer.dtype == dtype


@given(
    shape=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    rank=st.integers(1, 4),
    alpha=st.sampled_from([0.1, 16.0]),
    init=st.sampled_from(["pissa", "loftq"]),
    quantized=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_weight_is_shared_between_base_and_adapter(shape, rank, alpha, init, quantized, seed):
    """PiSSA's share is the best of its rank; over a dense base nothing is lost; LoftQ never loses what NF4 does."""
    torch.manual_seed(seed)
    weight = torch.randn(shape)
    q = kernels.quantize(weight)
    layer = NF4Linear(q) if quantized else Linear.from_weight(weight.clone())
    layer.lora_A, layer.lora_B = nn.Linear(shape[1], rank, bias=False), nn.Linear(rank, shape[0], bias=False)
    layer.scaling = alpha / rank
    take(layer, divided(layer, weight, init))
    if init == "pissa":
        left = torch.linalg.svdvals(weight)[rank:].norm()
        torch.testing.assert_close((weight - branch(layer)).norm(), left, rtol=1e-4, atol=1e-5)
        if not quantized:
            assert distance(weight, layer) < 1e-5 * float(weight.norm())
    else:
        assert distance(weight, layer) < float((weight - nf4.dequantize(q)).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_dense_base_pissa_starts_where_the_model_was(dtype):
    model = base(None, dtype)
    before, weights = model(IDS), {n: p.detach().clone() for n, p in model.named_parameters()}
    models.attach_lora(model, models.LoraConfig(rank=4, alpha=3.0, dropout=0.0, init="pissa"))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(model(IDS), before, atol=tolerance, rtol=0)
    for name, layer in adapted_layers(model):
        assert not torch.equal(layer.dense_weight(), weights[f"{name}.weight"])
        assert layer.dense_weight().float().norm() < weights[f"{name}.weight"].float().norm()


def test_over_a_dense_base_loftq_leaves_what_the_default_format_stores():
    model, weights = base(), base()
    models.attach_lora(model, models.LoraConfig(rank=4, init="loftq"))
    for name, layer in adapted_layers(model):
        weight = layer.dense_weight()
        torch.testing.assert_close(nf4.dequantize(nf4.quantize(weight)), weight, atol=2e-3, rtol=0)
        original = weight_of(weights, name)
        assert distance(original, layer) < float((original - nf4.dequantize(nf4.quantize(original))).norm())


@pytest.mark.parametrize("seed", range(3))
def test_loftq_keeps_the_best_of_its_rounds(monkeypatch, seed):
    """In small weights a later round is often worse: of these three in two."""
    torch.manual_seed(seed)
    weight, found = torch.randn(8, 16), []
    for rounds in range(1, lora_init.LOFTQ_ROUNDS + 1):
        monkeypatch.setattr(lora_init, "LOFTQ_ROUNDS", rounds)
        layer = NF4Linear(kernels.quantize(weight, nf4.QuantConfig(block_size=16)))
        layer.lora_A, layer.lora_B, layer.scaling = nn.Linear(16, 2, bias=False), nn.Linear(2, 8, bias=False), 2.0
        take(layer, divided(layer, weight, "loftq"))
        found.append(distance(weight, layer))
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


def test_the_triplets_of_a_large_weight_hold_nearly_all_that_the_exact_ones_do(monkeypatch):
    torch.manual_seed(0)
    spectrum = torch.arange(1, 97).float() ** -0.3  # falls slowly, as trained weights' do
    weight = torch.linalg.qr(torch.randn(128, 96)).Q * spectrum @ torch.linalg.qr(torch.randn(96, 96)).Q
    exact = triplets(weight, 8)
    monkeypatch.setattr(lora_init, "EXACT_UP_TO", 16)
    u, s, v = triplets(weight, 8)
    kept, best = (u * s @ v.T).norm(), (exact[0] * exact[1] @ exact[2].T).norm()
    assert float(kept) > (1 - 1e-3) * float(best)
    torch.testing.assert_close(u.T @ u, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(v.T @ v, torch.eye(8), atol=1e-5, rtol=0)
    again = triplets(weight, 8)
    assert all(torch.equal(one, other) for one, other in zip(again, (u, s, v), strict=True))


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_no_random_number_is_drawn(init, monkeypatch):
    monkeypatch.setattr(lora_init, "EXACT_UP_TO", 16)  # through the random subspace
    model = base(nf4.QuantConfig())
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    models.attach_lora(model, models.LoraConfig(rank=2, init=init, target_modules=("q_proj", "down_proj")))
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
@pytest.mark.parametrize("quant", [None, nf4.QuantConfig(), SEARCHED])
@pytest.mark.parametrize("dora", [False, True])
def test_base_checkpoint_and_adapter_give_the_trained_model_back(tmp_path, init, quant, dora):
    model = base(quant, torch.bfloat16)
    models.attach_lora(model, models.LoraConfig(rank=4, init=init, dora=dora, **PATTERNS))
    move(model)
    models.save_adapter(model, tmp_path / "a")
    again = base(quant, torch.bfloat16)
    models.load_adapter(again, tmp_path / "a")
    assert torch.equal(again(IDS), model.eval()(IDS))
    trained = model.state_dict()
    assert all(torch.equal(t, trained[n]) for n, t in again.state_dict().items())
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert raw["init_lora_weights"] == init
    models.merge_adapter(model)
    torch.testing.assert_close(model(IDS), again(IDS), atol=0.1, rtol=0)


@pytest.mark.parametrize("name", ["llama-raw-2", "llama-bin-sharded"])
def test_the_weights_are_found_in_any_layout(tmp_path, name):
    path = layout(name, tmp_path)
    model = models.load(path, nf4.QuantConfig(), dtype=torch.float32)
    models.attach_lora(model, models.LoraConfig(rank=4, init="pissa"))
    same = base(nf4.QuantConfig())
    models.attach_lora(same, models.LoraConfig(rank=4, init="pissa"))
    assert torch.equal(model(IDS), same(IDS))


# Refusals


def untouched(model, before):
    after = model.state_dict()
    assert next(adapted_layers(model), None) is None
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in after.items())


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_quantized_model_without_its_16_bit_source_is_refused(tmp_path, init):
    models.save(base(nf4.QuantConfig()), tmp_path / "quantized")
    shutil.copytree(GOLDEN / "llama-gqa", tmp_path / "gone")
    moved = models.load(tmp_path / "gone", nf4.QuantConfig(), dtype=torch.float32)
    shutil.rmtree(tmp_path / "gone")
    nowhere = base(nf4.QuantConfig())
    nowhere.source = None
    quantized = models.load(tmp_path / "quantized", dtype=torch.float32)
    shutil.copytree(GOLDEN / "llama-headdim-bias", tmp_path / "other")
    replaced = base(nf4.QuantConfig())
    replaced.source = tmp_path / "other"
    for model, message in (
        (quantized, r"needs the weights as they were before quantization, but .*quantized holds them quantized"),
        (nowhere, "but this model was not loaded from a checkpoint; load it with models.load"),
        (moved, "gone: no such file or directory"),
        (replaced, r"no longer holds model.layers.0.self_attn.q_proj.weight of shape \[64, 64\]; was it replaced"),
    ):
        before = model.state_dict()
        with pytest.raises(ValueError, match=message):
            models.attach_lora(model, models.LoraConfig(rank=2, init=init))
        untouched(model, before)


def test_an_adapter_is_refused_where_its_base_cannot_be_made_again(tmp_path):
    model = base(nf4.QuantConfig())
    models.attach_lora(model, models.LoraConfig(rank=2, init="loftq"))
    models.save_adapter(model, tmp_path / "a")
    models.save(base(nf4.QuantConfig()), tmp_path / "quantized")
    for other, message in (
        (models.load(tmp_path / "quantized", dtype=torch.float32), "holds them quantized; load the 16-bit checkpoint"),
        (base(SEARCHED), r"for a base stored as nf4 in blocks of 64.* but this one is stored as nf3 in blocks of 32"),
    ):
        before = other.state_dict()
        with pytest.raises(models.CheckpointError, match=message):
            models.load_adapter(other, tmp_path / "a")
        untouched(other, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4': it changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}, "does not say for which"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 1, "formats": []}},
            "loftq_iter is 1, not 5",
        ),
    ],
)
def test_starts_of_others_that_cannot_be_made_again_are_refused(tmp_path, change, message):
    shutil.copytree(GOLDEN / "lora", tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(models.CheckpointError, match=message):
        models.load_adapter(base(), tmp_path / "a")


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", False, None])
def test_starts_that_leave_the_base_alone_are_plain_adapters(tmp_path, init):
    shutil.copytree(GOLDEN / "lora", tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": init}))
    model, plain = base(), base()
    models.load_adapter(model, tmp_path / "a")
    models.load_adapter(plain, GOLDEN / "lora")
    assert torch.equal(model(IDS), plain(IDS))


def test_more_vectors_than_a_weight_has_are_refused():
    model = base()
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"PiSSA takes 33 singular vectors from \S+k_proj, which has 32; lower the"):
        models.attach_lora(model, models.LoraConfig(rank=33, init="pissa"))
    untouched(model, before)


def test_a_base_that_was_changed_is_not_said_to_be_given_back():
    model = base()
    models.attach_lora(model, models.LoraConfig(rank=2, init="pissa"))
    with pytest.raises(ValueError, match="init='pissa' have changed the base; load the model again"):
        detach(model)


def test_a_source_that_holds_nan_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "llama-gqa", tmp_path / "m")
    model = models.load(tmp_path / "m", nf4.QuantConfig(), dtype=torch.float32)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(models.CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN .* it did not when"):
        models.attach_lora(model, models.LoraConfig(rank=2, init="pissa"))
