"""The layers around the products: equal to the definition, traceable, and lean in what they keep."""

import re
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import chunked, cross_entropy, dispatch, glu, norm, reference, rope
from tests.judge import errs_at_most_twice

OPERATORS = ("rms_norm", "rotate", "swiglu", "linear_cross_entropy")
TRITON = (norm, rope, glu, cross_entropy)


def arguments(operator, dtype=torch.float32, rows=(2, 5), D=12, seed=0) -> Any:
    """What an operator takes; a gradient is asked of all that may have one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    L = torch.Size(rows).numel()
    if operator == "rms_norm":
        return normal(*rows, D), normal(D), 1e-5
    if operator == "swiglu":
        return normal(*rows, D), normal(*rows, D)
    if operator == "linear_cross_entropy":
        return normal(L, D), normal(30, D), torch.arange(L) % 30
    x = normal(2, L, 3, 2 * D)
    angles = torch.randn(2, 1, L, D, generator=generator)
    return x.detach().transpose(1, 2).requires_grad_(), angles.cos(), angles.sin()


def run(operators, operator, given):
    """The output of an operator and the gradients of what it was given."""
    given = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in given]
    leaves = [a for a in given if isinstance(a, torch.Tensor) and a.requires_grad]
    y = getattr(operators, operator)(*given)
    dy = torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype) if y.ndim else torch.tensor(0.7, dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.fixture(params=["plain", "c", "triton"])
def forms(request, monkeypatch):
    """The same operators over every kind of forms; Triton's in its interpreter, on CPU tensors."""
    rows = dispatch.table()
    if request.param == "plain":
        rows = tuple(r for r in rows if r.device != "cpu")
    if request.param == "triton":
        rows = (*(r._replace(device="cpu") for r in dispatch.gpu_rows()), *rows)
    monkeypatch.setattr(dispatch, "table", lambda planned_gpu=False: rows)
    return request.param


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("operator", OPERATORS)
@settings(max_examples=10)
@given(
    rows=st.lists(st.integers(0, 6), min_size=1, max_size=2).map(tuple),
    D=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_output_and_gradients_are_the_definitions(operator, rows, D, seed):
    given = arguments(operator, rows=rows, D=D, seed=seed)
    for our, their in zip(run(kernels, operator, given), run(reference, operator, given), strict=True):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_errs_at_most_twice_as_much_as_torch_against_float64(operator, dtype):
    given = arguments(operator, dtype, rows=(60,), D=40)
    exact = run(
        reference, operator, [a.double() if isinstance(a, torch.Tensor) and a.requires_grad else a for a in given]
    )
    results = zip(run(kernels, operator, given), run(reference, operator, given), exact, strict=True)
    for our, torchs, true in results:
        assert errs_at_most_twice(our, torchs, true)


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_are_those_of_finite_differences(operator):
    given = arguments(operator, torch.float64, rows=(4,), D=5)
    assert torch.autograd.gradcheck(getattr(kernels, operator), given, fast_mode=True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_compiled_graph_holds_the_operator_whole(operator, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' check of shapes cannot be traced
    compiled = torch.compile(getattr(kernels, operator), fullgraph=True, backend="aot_eager")

    class Compiled:
        pass

    setattr(Compiled, operator, staticmethod(compiled))
    given = arguments(operator)
    for our, eager in zip(run(Compiled, operator, given), run(kernels, operator, given), strict=True):
        torch.testing.assert_close(our, eager)


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("operator", "extra"),
    [
        ("rms_norm", ()),
        ("rotate", (False,)),
        ("rotate", (True,)),
        ("swiglu", ()),
        ("linear_cross_entropy", (-100, True, True)),
        ("linear_cross_entropy", (-100, False, False)),
    ],
)
def test_torch_agrees_that_it_is_an_operator(operator, extra, dtype):
    given = arguments(operator, dtype)
    if extra[1:] == (False, False):  # no gradient is asked for, so none may be wanted
        given = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in given)
    torch.library.opcheck(getattr(torch.ops.qlora, operator).default, (*given, *extra))


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("need_weight", [False, True])
def test_torch_agrees_that_the_gradients_are_operators(need_weight):
    x, weight, _ = (a.detach() if isinstance(a, torch.Tensor) else a for a in arguments("rms_norm"))
    torch.library.opcheck(torch.ops.qlora.rms_norm_grad.default, (x, x, weight, torch.ones(2, 5, 1), need_weight))
    torch.library.opcheck(torch.ops.qlora.swiglu_grad.default, (x, x, x))


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x.contiguous(), lambda x: x[..., ::2], lambda x: x.mT.contiguous().mT]
)
def test_a_rotation_keeps_the_layout_of_heads_beside_one_another(view):
    x, cos, sin = arguments("rotate")
    x = view(x.detach())
    y = kernels.rotate(x, cos[..., : x.shape[-1] // 2], sin[..., : x.shape[-1] // 2])
    assert y.stride() == (x if x.stride(-1) == 1 else x.contiguous()).stride()
    torch.library.opcheck(
        torch.ops.qlora.rotate.default, (x, cos[..., : x.shape[-1] // 2], sin[..., : x.shape[-1] // 2], False)
    )


@pytest.mark.parametrize(
    ("operator", "kept"),
    [
        ("rms_norm", [(2, 5, 12), (12,), (2, 5, 1)]),
        ("rotate", [(2, 1, 10, 12), (2, 1, 10, 12)]),
        ("swiglu", [(2, 5, 12), (2, 5, 12)]),
        ("linear_cross_entropy", [(10, 12), (30, 12)]),
    ],
)
def test_what_is_kept_for_backward_is_little_more_than_what_came_in(operator, kept):
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        y = getattr(kernels, operator)(*arguments(operator))
    assert [s for s in shapes if s] == kept
    assert y.requires_grad


@pytest.mark.usefixtures("forms")
@pytest.mark.parametrize("operator", ["rms_norm", "swiglu", "linear_cross_entropy"])
def test_only_the_gradients_asked_for_are_made(operator):
    for asked in range(4):
        given = list(arguments(operator))
        for i in (0, 1):
            given[i] = given[i].detach().requires_grad_(bool(asked >> i & 1))
        y = getattr(kernels, operator)(*given)
        assert y.requires_grad == bool(asked)
        if asked:
            z = getattr(reference, operator)(*given)
            wanted = [a for a in given[:2] if a.requires_grad]
            ours, theirs = (torch.autograd.grad(out.square().sum(), wanted) for out in (y, z))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("operator", ["rms_norm", "swiglu", "linear_cross_entropy"])
def test_a_second_derivative_is_refused_rather_than_wrong(operator):
    given = arguments(operator)
    (first,) = torch.autograd.grad(getattr(kernels, operator)(*given).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_a_frozen_norm_and_a_frozen_head_make_no_gradient_of_the_weight():
    x, weight, _ = arguments("rms_norm")
    _, dweight = torch.ops.qlora.rms_norm_grad(x.detach(), x.detach(), weight.detach(), torch.ones(2, 5, 1), False)
    assert dweight.numel() == 0
    hidden, weight, targets = arguments("linear_cross_entropy")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.linear_cross_entropy(hidden, weight.detach(), targets)
    assert [tuple(t.shape) for t in kept if t.ndim] == [(10, 12), (0,)]


def test_a_weight_in_float32_gives_the_dtype_of_x():
    x, weight, eps = arguments("rms_norm", torch.bfloat16)
    wide = weight.detach().float().requires_grad_()
    for operators in (kernels, reference):
        y = operators.rms_norm(x, wide, eps)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert wide.grad is not None
        assert wide.grad.dtype == torch.float32
    torch.testing.assert_close(kernels.rms_norm(x, wide, eps), kernels.rms_norm(x, weight, eps))


def test_a_rotation_keeps_lengths_and_depends_only_on_how_far_apart_tokens_are():
    x, _, _ = arguments("rotate")
    angles = torch.arange(10.0)[None, None, :, None] * torch.linspace(0.1, 2, 12)
    same = x[:, :, :1].expand_as(x)
    y = kernels.rotate(same, angles.cos(), angles.sin())
    torch.testing.assert_close(y.norm(dim=-1), same.norm(dim=-1))
    products = y @ y.mT  # (B, H, T, T): constant along diagonals
    torch.testing.assert_close(products[..., 1:, 1:], products[..., :-1, :-1], atol=1e-4, rtol=1e-4)


def test_losses_of_each_target_average_to_the_mean_over_those_scored():
    hidden, weight, targets = (t.detach() for t in arguments("linear_cross_entropy"))
    targets[3:6] = -100
    for operators in (kernels, reference):
        losses = operators.linear_cross_entropy(hidden, weight, targets, reduction="none")
        assert not losses[3:6].any()
        mean = operators.linear_cross_entropy(hidden, weight, targets)
        torch.testing.assert_close(mean, losses.sum() / 7)
        torch.testing.assert_close(
            operators.linear_cross_entropy(hidden, weight, targets.clamp_min(0), 0), mean_of(losses, targets)
        )


def mean_of(losses, targets):
    """Where 0 stands for not scored, the target that is truly 0 is not scored either."""
    return losses[targets > 0].mean()


def test_with_nothing_to_score_the_mean_is_nan_and_the_gradient_zero():
    hidden, weight, targets = arguments("linear_cross_entropy")
    for operators in (kernels, reference):
        loss = operators.linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
        assert loss.isnan()
        assert not torch.autograd.grad(loss, hidden)[0].any()


def test_small_gradients_survive_float16_when_the_loss_is_scaled():
    """Divided by the number of tokens in forward they would be below float16's smallest number."""
    hidden, weight, targets = arguments("linear_cross_entropy", torch.float16, rows=(40,), D=8)
    many = hidden.detach().repeat(500, 1).requires_grad_()
    (scaled,) = torch.autograd.grad(kernels.linear_cross_entropy(many, weight, targets.repeat(500)) * 20000, many)
    (single,) = torch.autograd.grad(kernels.linear_cross_entropy(hidden, weight, targets) * 40, hidden)
    torch.testing.assert_close(scaled[:40], single, atol=1e-3, rtol=2e-3)


def test_the_factor_of_the_gradient_is_not_rounded_to_16_bits():
    hidden, weight, targets = arguments("linear_cross_entropy", torch.bfloat16, rows=(4,), D=2000)
    loss = kernels.linear_cross_entropy(hidden, weight, targets)
    once, more = (torch.autograd.grad(loss * factor, hidden, retain_graph=True)[0] for factor in (1, 385 / 256))
    assert more.float().norm() / once.float().norm() == pytest.approx(385 / 256, abs=1e-3)  # bfloat16 has 1.5


def test_of_all_that_the_head_gives_only_the_sum_has_a_gradient():
    outputs = torch.ops.qlora.linear_cross_entropy(*arguments("linear_cross_entropy"), -100, True, True)
    assert [out.requires_grad for out in outputs] == [False, True, False, False]


@pytest.mark.parametrize("operators", [kernels, reference])
@pytest.mark.parametrize("wrong", [30, -1, -101, 10**12])
def test_a_target_outside_the_vocabulary_is_refused(operators, wrong):
    hidden, weight, targets = arguments("linear_cross_entropy")
    targets[4] = wrong
    message = f"targets are -100 (not scored) or in [0, 30), the size of the vocabulary, but one is {wrong}"
    with pytest.raises(ValueError, match=re.escape(message)):
        operators.linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("operators", [kernels, reference])
@pytest.mark.parametrize(
    ("operator", "given", "problem"),
    [
        ("rms_norm", (torch.ones(2, 3), torch.ones(4), 0.1), r"it is \(4,\) and x is \(2, 3\)"),
        ("rms_norm", (torch.ones(()), torch.ones(()), 0.1), r"it is \(\) and x is \(\)"),
        ("rotate", (torch.ones(1, 2, 3, 5), *[torch.ones(1, 1, 3, 2)] * 2), r"even number C .* not \(1, 2, 3, 5\)"),
        ("rotate", (torch.ones(2, 3, 4), *[torch.ones(1, 1, 3, 2)] * 2), r"even number C .* not \(2, 3, 4\)"),
        ("rotate", (torch.ones(2, 2, 3, 4), *[torch.ones(2, 1, 3, 4)] * 2), r"are \(2, 1, 3, 2\) or have 1 for 2"),
        ("swiglu", (torch.ones(2), torch.ones(3)), r"they are \(2,\) torch.float32 and \(3,\) torch.float32"),
        ("swiglu", (torch.ones(2), torch.ones(2).half()), r"\(2,\) torch.float32 and \(2,\) torch.float16"),
        ("linear_cross_entropy", (torch.ones(2, 3), torch.ones(5, 4), torch.ones(2).long()), r"\(2, 3\) and \(5, 4\)"),
        ("linear_cross_entropy", (torch.ones(2, 3), torch.ones(5, 3), torch.ones(3).long()), r"not \(3,\)"),
        ("linear_cross_entropy", (torch.ones(2, 3), torch.ones(5, 3).half(), torch.ones(2).long()), "one dtype"),
    ],
)
def test_what_does_not_fit_is_refused(operators, operator, given, problem):
    with pytest.raises(ValueError, match=problem):
        getattr(operators, operator)(*given)


def test_an_unknown_reduction_and_a_gradient_of_single_losses_are_refused():
    given = arguments("linear_cross_entropy")
    for operators in (kernels, reference):
        with pytest.raises(ValueError, match='reduction is "mean" or "none", not \'sum\''):
            operators.linear_cross_entropy(*given, reduction="sum")
    with pytest.raises(ValueError, match=r"is for evaluation and has no gradient; call it under torch.no_grad\(\)"):
        kernels.linear_cross_entropy(*given, reduction="none")


def test_a_gpu_gets_triton_but_for_what_triton_does_not_take(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    cuda = {r.operator: r for r in dispatch.table.__wrapped__() if r.device == "cuda" and r.operator in OPERATIONS}
    assert set(cuda) == OPERATIONS
    x = torch.ones(2, 4)
    for row in cuda.values():
        assert row.form.__module__ in [module.__name__ for module in TRITON]
        assert row.accepts(x, x)
        assert not row.accepts(x.double(), x.double())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "cuda" not in {r.device for r in dispatch.table.__wrapped__()}


OPERATIONS = {"rms_norm", "rms_norm_grad", "rotate", "swiglu", "swiglu_grad", "cross_entropy"}


def test_every_argument_of_a_shipped_kernel_has_a_type_or_a_value():
    shipped = [one for module in TRITON for one in module.shipped()]
    assert len({one.name for one in shipped}) == len(shipped)
    for one in shipped:
        assert sorted([*one.signature, *one.launch.constants]) == sorted(one.kernel.arg_names)
        assert set(one.aligned) <= set(one.signature)


def test_chunks_are_what_the_operator_uses(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": 1})
    given = arguments("linear_cross_entropy", rows=(50,))
    for our, their in zip(
        run(kernels, "linear_cross_entropy", given), run(reference, "linear_cross_entropy", given), strict=True
    ):
        torch.testing.assert_close(our, their, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("operators", [kernels, reference])
@pytest.mark.parametrize("operator", OPERATORS)
def test_tensors_of_two_devices_are_refused_before_anything_reads_them(operators, operator):
    first, second, *rest = arguments(operator)
    with pytest.raises(ValueError, match="on one device, but these are on cpu and meta"):
        getattr(operators, operator)(first, second.detach().to("meta"), *rest)
