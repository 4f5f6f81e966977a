"""Operators in two guises: whole where something looks at them, plain where they are merely computed, and the same."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import layer_ops, ops
from kernels.operator import operator, wanted_whole
from nf4 import QuantConfig, quantize


class Looking(TorchDispatchMode):
    """Notes every operator that passes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def given():
    """Operators with arguments of each kind, tensors that may have a gradient first."""
    q = quantize(normal(12, 64), QuantConfig(block_size=32))
    x, bias, a, b = normal(5, 64), normal(12), normal(3, 64), normal(12, 3)
    stored = ops.parts(q)
    return [
        (ops.linear, (x, bias, *stored)),
        (ops.lora_linear, (x, a, b, 0.5, bias, 0.3, torch.tensor(7), *stored)),
        (layer_ops.norm_op, (x, normal(64), 1e-5)),
        (layer_ops.swiglu_op, (x, normal(5, 64, seed=1))),
        (layer_ops.rotate_op, (normal(1, 2, 5, 8), normal(1, 1, 5, 4), normal(1, 1, 5, 4), False)),
        (layer_ops.cross_entropy_op, (x, normal(9, 64), torch.arange(5), -100, True, True)),
    ]


def outcome(call, arguments):
    leaves = [
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.dtype == torch.float32 and a.ndim else a
        for a in arguments
    ]
    out = call(*leaves)
    (y, *_) = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.sum(), wanted, allow_unused=True)]


@pytest.mark.parametrize(("op", "arguments"), given(), ids=lambda given: getattr(given, "__name__", ""))
def test_both_guises_give_the_same_and_the_same_gradients(op, arguments):
    for plain, whole in zip(outcome(op, arguments), outcome(op.known, arguments), strict=True):
        assert (plain is None) == (whole is None)
        assert plain is None or torch.equal(plain, whole)


def test_a_mode_sees_operators_whole_and_else_they_do_not_pass_through_torch():
    q = quantize(normal(12, 64), QuantConfig(block_size=32))
    x = normal(5, 64)
    with Looking() as mode:
        seen = kernels.nf4_linear(x, q)
    assert "qlora.nf4_linear.default" in mode.seen
    assert torch.equal(kernels.nf4_linear(x, q), seen)
    assert kernels.nf4_linear(x.to("meta"), q.to("meta")).shape == (5, 12)


def test_only_plain_tensors_with_values_are_merely_computed():
    class Other(torch.Tensor):
        pass

    assert not wanted_whole(torch.zeros(1))
    assert not wanted_whole(torch.nn.Parameter(torch.zeros(1)))
    assert wanted_whole(torch.zeros(1).as_subclass(Other))
    assert wanted_whole(torch.zeros(1, device="meta"))


def test_without_gradients_nothing_is_kept_for_them():
    x = normal(5, 64).requires_grad_()
    with torch.no_grad():
        assert not layer_ops.swiglu_op(x, x).requires_grad
    assert layer_ops.swiglu_op(x, x).grad_fn is not None


def test_an_operator_without_gradients_is_its_function():
    @operator("doubled_in_a_test", "(Tensor x) -> Tensor")
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    doubled.register_fake(torch.empty_like)
    assert doubled(torch.ones(2)).tolist() == [2, 2]
    assert torch.ops.qlora.doubled_in_a_test(torch.ones(2)).tolist() == [2, 2]
