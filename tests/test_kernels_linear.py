"""Linear layers on stored weights: equal to the definition, forward and backward; lean in what they keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import dispatch, reference
from nf4 import QuantConfig, dequantize
from tests.judge import errs_at_most_twice

K, N, R = 20, 12, 3


def layer(seed=0, dtype=torch.float32, adapter=torch.float32, K=K, N=N, R=R, tokens=(2, 5)):
    """x, q, A, B, bias with gradients asked of all that may have them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    q = kernels.quantize(normal(N, K, dtype=torch.float32), QuantConfig(block_size=16))
    x, bias = normal(*tokens, K, dtype=dtype), normal(N, dtype=dtype)
    return x, q, normal(R, K, dtype=adapter), normal(N, R, dtype=adapter), bias


def run(operators, arguments, **options):
    """The output of an operator and the gradients of what it was given."""
    leaves = [
        argument.detach().requires_grad_(argument.requires_grad) if isinstance(argument, torch.Tensor) else argument
        for argument in arguments
    ]
    x, q, lora_a, lora_b, bias = leaves
    y = operators.nf4_lora_linear(x, q, lora_a, lora_b, 0.7, bias, **options)
    weight = torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype)
    (y * weight).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in (x, lora_a, lora_b, bias))]


@settings(max_examples=40)
@given(
    tokens=st.lists(st.integers(0, 6), min_size=0, max_size=3).map(tuple),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5)),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**62),
)
def test_output_and_gradients_are_the_definitions(tokens, sizes, dropout, seed):
    K, N, R = sizes
    arguments = layer(seed, K=K, N=N, R=R, tokens=tokens)
    ours = run(kernels, arguments, dropout=dropout, seed=seed)
    theirs = run(reference, arguments, dropout=dropout, seed=seed)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", ["float32", "same"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_in_16_bits_it_errs_at_most_twice_as_much_as_torch_against_float64(dtype, adapter, dropout):
    arguments = layer(3, dtype, torch.float32 if adapter == "float32" else dtype, K=256, N=192, R=16, tokens=(40,))
    exact = run(
        reference,
        [a.double() if isinstance(a, torch.Tensor) else a for a in arguments],
        dropout=dropout,
        seed=5,
    )
    ours = run(kernels, arguments, dropout=dropout, seed=5)
    torchs = run(reference, arguments, dropout=dropout, seed=5)
    for our, torchs_own, true in zip(ours, torchs, exact, strict=True):
        assert our is not None
        assert torchs_own is not None
        assert true is not None
        assert our.dtype == torchs_own.dtype
        assert (our.double() - true).norm() <= 2 * (torchs_own.double() - true).norm() + 1e-12


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(dropout):
    x, q, lora_a, lora_b, bias = layer(1, torch.float64, torch.float64)

    def branch(x, lora_a, lora_b, bias):
        return kernels.nf4_lora_linear(x, q, lora_a, lora_b, 0.7, bias, dropout, 11)

    assert torch.autograd.gradcheck(branch, (x, lora_a, lora_b, bias))
    assert torch.autograd.gradcheck(lambda x, bias: kernels.nf4_linear(x, q, bias), (x, bias))


def test_the_base_layer_is_a_plain_linear_layer():
    x, q, _, _, bias = layer()
    expected = torch.nn.functional.linear(x, dequantize(q, torch.float32), bias)
    for operators in (kernels, reference):
        torch.testing.assert_close(operators.nf4_linear(x, q, bias), expected)
        torch.testing.assert_close(operators.nf4_linear(x, q), expected - bias)


@pytest.mark.parametrize("tokens", [1, 20, 40, 270])
@pytest.mark.parametrize("outputs", [48, 96])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_forms_of_a_gpu_are_the_definition_forward_and_backward(tokens, outputs, dtype, monkeypatch):
    """Few tokens, a middle range and many; the branch beside the product and in it. In Triton's interpreter."""
    on_cpu = tuple(row._replace(device="cpu") for row in dispatch.gpu_rows())
    definitions = tuple(row for row in dispatch.table() if row.device == "any")
    monkeypatch.setattr(dispatch, "table", lambda planned_gpu=False: on_cpu + definitions)
    arguments = layer(2, dtype, K=64, N=outputs, R=4, tokens=(tokens,))
    exact = run(reference, [a.double() if isinstance(a, torch.Tensor) else a for a in arguments], dropout=0.25, seed=9)
    ours = run(kernels, arguments, dropout=0.25, seed=9)
    for our, torchs, true in zip(ours, run(reference, arguments, dropout=0.25, seed=9), exact, strict=True):
        assert our is not None
        assert torchs is not None
        assert true is not None
        assert errs_at_most_twice(our, torchs, true)


def test_only_the_gradients_asked_for_are_made():
    x, q, lora_a, lora_b, bias = layer()
    for asked in range(16):
        tensors = [t.detach().requires_grad_(bool(asked >> i & 1)) for i, t in enumerate((x, lora_a, lora_b, bias))]
        for dropout in (0.0, 0.5):
            x, lora_a, lora_b, bias = tensors
            y = kernels.nf4_lora_linear(x, q, lora_a, lora_b, 2.0, bias, dropout, 3)
            z = reference.nf4_lora_linear(x, q, lora_a, lora_b, 2.0, bias, dropout, 3)
            wanted = [t for t in tensors if t.requires_grad]
            assert y.requires_grad == bool(wanted)
            if wanted:
                ours, theirs = (torch.autograd.grad(out.square().sum(), wanted) for out in (y, z))
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_is_kept_for_backward_is_x_the_adapter_and_little_else(dropout):
    x, q, lora_a, lora_b, bias = layer(K=64, N=48, tokens=(10,))
    stored = {t.data_ptr() for t in q.tensors().values()}
    kept = []

    def keep(tensor):
        if tensor.data_ptr() not in stored:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        kernels.nf4_linear(x, q, bias)
        assert kept == []
        kernels.nf4_lora_linear(x, q, lora_a, lora_b, 1.0, bias, dropout)
    seed = [torch.Size([])] if dropout else []
    assert [t.shape for t in kept] == [x.shape, lora_a.shape, lora_b.shape, *seed, (10, R)]
    assert kept[0].data_ptr() == x.data_ptr()  # x itself, not what dropout left of it


def test_without_gradient_for_a_x_is_not_kept():
    x, q, lora_a, lora_b, _ = layer()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.nf4_lora_linear(x, q, lora_a.detach(), lora_b, 1.0)
    assert x.shape not in [t.shape for t in kept]


@pytest.mark.parametrize("operators", [kernels, reference])
def test_checkpointing_gives_the_same_gradients_with_a_drawn_seed(operators):
    x, q, lora_a, lora_b, bias = layer()

    def branch(x):
        return operators.nf4_lora_linear(x, q, lora_a, lora_b, 0.7, bias, 0.5).sin()

    def gradients(forward):
        torch.manual_seed(7)
        return torch.autograd.grad(forward(x).square().sum(), (x, lora_a, lora_b, bias))

    plain = gradients(branch)
    recomputed = gradients(lambda x: checkpoint(branch, x, use_reentrant=False))
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


def test_dropout_keeps_its_share_and_the_mean_and_spares_the_base():
    x, q, lora_a, lora_b, _ = layer()
    dropped = reference.drop(torch.ones(1000, 100), 0.3, 1)
    assert (dropped == 0).float().mean() == pytest.approx(0.3, abs=0.01)
    assert dropped.mean() == pytest.approx(1, abs=0.01)
    out = kernels.nf4_lora_linear(x, q, lora_a, torch.zeros_like(lora_b), 1.0, None, 0.9)
    assert torch.equal(out, kernels.nf4_linear(x, q))


def test_a_seed_fixes_the_mask_and_none_draws_one_from_torch():
    mask = reference.dropout_mask((50, 50), 0.5, 3, torch.device("cpu"))
    assert torch.equal(mask, reference.dropout_mask((50, 50), 0.5, 3, torch.device("cpu")))
    assert torch.equal(mask.view(-1)[:77], reference.dropout_mask((7, 11), 0.5, 3, torch.device("cpu")).view(-1))
    assert not torch.equal(mask, reference.dropout_mask((50, 50), 0.5, 4, torch.device("cpu")))
    x, q, lora_a, lora_b, _ = layer()

    def drawn(seed):
        torch.manual_seed(seed)
        return kernels.nf4_lora_linear(x, q, lora_a, lora_b, 1.0, None, 0.5)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_quantize_and_dequantize_are_nf4s_and_take_the_dtype_by_position():
    weight = torch.randn(5, 64)
    q = kernels.quantize(weight, QuantConfig(codebook="int4"))
    assert q.config.codebook == "int4"
    assert torch.equal(kernels.dequantize(q, torch.bfloat16), dequantize(q, torch.bfloat16))
    assert torch.equal(kernels.dequantize(q), reference.dequantize(q))


@pytest.mark.parametrize("operators", [kernels, reference])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"x": torch.zeros(2, 19)}, "x has 19 features per token but the weight takes 20"),
        ({"x": torch.zeros(())}, "x has 0 features per token but the weight takes 20"),
        ({"bias": torch.zeros(13)}, r"the bias has the shape \(13,\) but the weight gives 12 outputs"),
        ({"lora_a": torch.zeros(3, 21)}, r"lora_a is \(3, 21\) but the weight takes \(rank, 20\)"),
        ({"lora_b": torch.zeros(12, 4)}, r"lora_b is \(12, 4\) but the weight and lora_a take \(12, 3\)"),
        ({"bias": torch.zeros(12, device="meta")}, "on one device, but these are on cpu and meta"),
        ({"lora_a": torch.zeros(3, 20, device="meta")}, "on one device, but these are on cpu and meta"),
        ({"q": kernels.quantize(torch.zeros(12, 20)).to("meta")}, "on one device, but these are on cpu and meta"),
        ({"dropout": 1.0}, r"must be in \[0, 1\), not 1.0"),
        ({"dropout": -0.1}, r"must be in \[0, 1\), not -0.1"),
        ({"q": kernels.quantize(torch.zeros(4, 3, 5))}, r"this one has the shape \(4, 3, 5\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(operators, change, problem):
    x, q, lora_a, lora_b, bias = layer()
    arguments = {"x": x, "q": q, "lora_a": lora_a, "lora_b": lora_b, "scaling": 1.0, "bias": bias, **change}
    with pytest.raises(ValueError, match=problem):
        operators.nf4_lora_linear(**arguments)
