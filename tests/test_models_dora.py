"""DoRA: the reference implementation's answers, the formula, and rows whose length is hard to compute."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kernels
import models
import nf4
from models.attachment import adapted_layers
from models.dora import direct_squares, expanded_squares
from models.linear import AdaptableLinear, Linear, NF4Linear
from tests.golden import GOLDEN, answers

IDS = torch.arange(24).view(2, 12) % 128
DORA = models.LoraConfig(rank=3, alpha=5.0, dora=True, dropout=0.0)


def base(quant=None, dtype=torch.float32, name="llama-gqa"):
    return models.load(GOLDEN / name, quant, dtype=dtype)


def layer_of(kind, weight, bias=None, rank=2, scaling=0.5, seed=0) -> AdaptableLinear:
    """A layer with an adapter in which nothing is zero, and a magnitude that is not the rows' length."""
    torch.manual_seed(seed)
    bias = None if bias is None else nn.Parameter(bias)
    if kind == "dense":
        layer = Linear.from_weight(weight, bias)
    else:
        layer = NF4Linear(kernels.quantize(weight, nf4.QuantConfig(block_size=32)), bias)
    N, K = weight.shape
    layer.lora_A, layer.lora_B = nn.Linear(K, rank, bias=False), nn.Linear(rank, N, bias=False)
    layer.scaling = scaling
    layer.lora_magnitude_vector = nn.Parameter(torch.rand(N) + 0.5)
    layer.weight.requires_grad_(False)
    return layer


def parts(layer: AdaptableLinear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    assert layer.lora_magnitude_vector is not None
    return layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector


def test_an_adapter_gives_the_reference_implementations_answers():
    model, io = base(), answers("lora-dora")
    models.load_adapter(model, GOLDEN / "lora-dora")
    there = io["attention_mask"].bool()
    logits = model(io["input_ids"], io["attention_mask"])
    torch.testing.assert_close(logits[there], io["logits"][there], atol=1e-4, rtol=0)
    loss = model.loss(input_ids=io["input_ids"], attention_mask=io["attention_mask"], labels=io["labels"])
    torch.testing.assert_close(loss, io["loss"], atol=1e-4, rtol=0)
    loss.backward()
    gradients = [key for key in io if key.startswith("grad.")]
    assert len(gradients) == 3
    for key in gradients:
        name = key.removeprefix("grad.base_model.model.").replace(".default", "")
        name = name.replace("magnitude_vector.weight", "magnitude_vector")
        torch.testing.assert_close(model.get_parameter(name).grad, io[key], atol=1e-4, rtol=0)
    models.merge_adapter(model)
    merged = model(io["input_ids"], io["attention_mask"])
    torch.testing.assert_close(merged[there], io["logits"][there], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-headdim-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", [None, nf4.QuantConfig()])
def test_at_the_start_the_model_is_its_base(quant, dtype, name):
    """To the bit where a bias is not added after the product, and there to its rounding."""
    model = base(quant, dtype, name)
    before = model(IDS)
    models.attach_lora(model, models.LoraConfig(rank=3, dora=True, dropout=0.5))
    for mode in (model.eval(), model.train()):  # B is zero, so that dropout changes nothing
        after = mode(IDS)
        if name == "llama-gqa":
            assert torch.equal(after, before)
        torch.testing.assert_close(after, before, atol=1e-5 if dtype == torch.float32 else 5e-2, rtol=0)
    for _, layer in adapted_layers(model):
        assert layer.lora_magnitude_vector is not None
        assert layer.lora_magnitude_vector.dtype == torch.float32
        lengths = layer.dense_weight().float().norm(dim=1)
        tolerance = 1e-6 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(layer.lora_magnitude_vector.detach(), lengths, rtol=tolerance, atol=0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_output_and_gradients_are_the_formulas(kind, with_bias):
    torch.manual_seed(1)
    weight, x = torch.randn(6, 32), torch.randn(2, 5, 32, requires_grad=True)
    layer = layer_of(kind, weight, torch.randn(6) if with_bias else None)
    y = layer(x)
    target = torch.randn_like(y)
    trained = [x, *parts(layer), *([] if layer.bias is None else [layer.bias])]
    gradients = torch.autograd.grad(y, trained, target)

    a, b, m = parts(layer)
    merged = layer.dense_weight() + layer.scaling * b @ a
    plain = m / merged.norm(dim=1).detach() * (x @ merged.T) + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(y, plain)
    for ours, theirs in zip(gradients, torch.autograd.grad(plain, trained, target), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_in_bfloat16_nothing_but_the_product_is_rounded_twice(kind):
    torch.manual_seed(2)
    weight, x = torch.randn(64, 32), torch.randn(7, 32)
    layer = layer_of(kind, weight.bfloat16(), torch.randn(64).bfloat16())
    assert layer.bias is not None
    with torch.no_grad():
        y = layer(x.bfloat16())
        a, b, m = parts(layer)
        merged = layer.dense_weight().float() + layer.scaling * b @ a
        exact = m / merged.norm(dim=1) * (x.bfloat16().float() @ merged.T) + layer.bias
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=2**-7, atol=4 * 2**-7)


def test_dropout_falls_on_the_branchs_input_and_the_base_sees_all_of_it():
    layer = layer_of("dense", torch.randn(4, 32))
    layer.dropout = 0.5
    x = torch.ones(400, 32)
    a, b, m = parts(layer)
    with torch.no_grad():
        steady = layer.eval()(x)
        y = layer.train()(x)
        factor = m / (layer.weight + layer.scaling * b @ a).norm(dim=1)
        # Less the base's part, what is left is B A drop(x): all entries of x are 1, so twice the sum of a part of A.
        branch = (y / factor - x @ layer.weight.T) / layer.scaling
        torch.testing.assert_close(branch, branch @ torch.linalg.pinv(b.T) @ b.T, atol=1e-4, rtol=0)
        assert branch.std(0).min() > 0
        torch.testing.assert_close(y.mean(0), steady[0], atol=0.3, rtol=0)


# Lengths of rows


@given(
    rows=st.integers(1, 9),
    rank=st.integers(1, 5),
    scaling=st.sampled_from([0.25, 2.0, 16.0]),
    nearness=st.sampled_from([0.0, 0.5, 1 - 1e-2, 1 - 1e-3]),
    seed=st.integers(0, 99),
)
def test_lengths_from_the_expansion_are_the_rows_own(rows, rank, scaling, nearness, seed):
    """Also where W nearly is -s B A: such rows are told apart, and the others are good to 1e-4."""
    torch.manual_seed(seed)
    a, b = torch.randn(rank, 24), torch.randn(rows, rank)
    weight = -nearness * scaling * b @ a + (1 - nearness) * torch.randn(rows, 24) * scaling
    squares, doubtful = expanded_squares(weight.double().square().sum(1), weight @ a.T, a, b, scaling)
    own = (weight.double() + scaling * b.double() @ a.double()).square().sum(1)
    torch.testing.assert_close(squares[~doubtful].sqrt(), own[~doubtful].sqrt(), rtol=1e-4, atol=0)
    assert bool((squares > 0).all())
    if nearness > 0.9:
        assert bool(doubtful.any())
    torch.testing.assert_close(direct_squares(weight, a, b, scaling), own, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_merged_weight_near_zero_has_its_own_length(kind):
    layer = layer_of(kind, torch.randn(6, 32), rank=32, scaling=1.0)
    a, b, _ = parts(layer)
    with torch.no_grad():
        a.copy_(torch.eye(32))
        b.copy_(-layer.dense_weight() * (1 - 1e-4))
        b[3] = 0.0  # one row as it is, between those that nearly cancel
        expected = (layer.dense_weight().double() + b.double() @ a.double()).norm(dim=1)
        torch.testing.assert_close(layer.row_lengths().double(), expected, rtol=1e-3, atol=0)
        assert bool((layer.row_lengths(exact=False) > 0).all())


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_row_of_zeros_stays_one_and_makes_no_nan(kind):
    weight = torch.randn(4, 32)
    weight[1] = 0.0
    layer = layer_of(kind, weight, torch.ones(4))
    with torch.no_grad():
        parts(layer)[1].zero_()
        layer.lora_magnitude_vector = nn.Parameter(layer.row_lengths())
    y = layer(torch.randn(3, 32))
    assert torch.equal(y[:, 1], torch.ones(3))
    y.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parts(layer))
    assert bool(models.lora.merged(layer.dense_weight(), layer).isfinite().all())


def test_after_the_first_forward_no_dense_weight_is_made(monkeypatch):
    layer = layer_of("nf4", torch.randn(6, 32))
    made = Counter()
    decode = kernels.dequantize
    monkeypatch.setattr(kernels, "dequantize", lambda *arguments: made.update(["dense"]) or decode(*arguments))
    for _ in range(3):
        layer(torch.randn(2, 32)).sum().backward()
    assert made["dense"] == 1


def test_lengths_follow_the_layer_through_casts_moves_and_another_base_and_stay_float32():
    layer = layer_of("nf4", torch.randn(6, 32))
    assert isinstance(layer, NF4Linear)
    before = layer.row_lengths()
    layer.to(torch.bfloat16)
    a, b, _ = parts(layer)
    merged = kernels.dequantize(layer.quantized, torch.float32) + layer.scaling * b.float() @ a.float()
    assert layer.row_lengths().dtype == torch.float32
    torch.testing.assert_close(layer.row_lengths(), merged.norm(dim=1), rtol=1e-5, atol=0)
    assert not torch.equal(layer.row_lengths(), before)  # A and B were rounded
    assert layer.base_squares is not None
    layer.base_squares = layer.base_squares.to("meta")  # as if left on another device
    torch.testing.assert_close(layer.row_lengths(), merged.norm(dim=1), rtol=1e-5, atol=0)
    for size, change in ((2, layer.store), (4, layer.refill)):
        change(kernels.quantize(size * torch.randn(6, 32)))
        assert float(layer.row_lengths().mean()) > 0.75 * size * float(before.mean())


# In a model


@pytest.mark.parametrize("quant", [None, nf4.QuantConfig()])
def test_a_step_of_training_moves_all_three_parts_and_nothing_else(quant):
    torch.manual_seed(0)
    model = base(quant)
    models.attach_lora(model, DORA)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model.loss(input_ids=IDS, labels=IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {n for n in before if ".lora_" in n}
    assert sum(n.endswith(".lora_magnitude_vector") for n in moved) == 14


@pytest.mark.parametrize("quant", [None, nf4.QuantConfig()])
def test_merging_keeps_what_the_adapter_does(quant):
    torch.manual_seed(0)
    model = base(quant)
    models.attach_lora(model, DORA)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    before = model(IDS)
    models.merge_adapter(model)
    assert not any(".lora_" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(IDS), before, atol=1e-4, rtol=1e-4)
