"""The operators as torch sees them: schemas, shapes without values, gradients, and models that compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import dispatch, ops
from nf4 import QuantConfig, quantize

ROOT = Path(__file__).parent.parent


def stored(double_quant=True, N=12, K=64):
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return quantize(weight, QuantConfig(block_size=32, double_quant=double_quant))


def adapter(N=12, K=64, R=3):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(R, K, generator=generator).requires_grad_(),
        torch.randn(N, R, generator=generator).requires_grad_(),
    )


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("tokens", [3, 20])
def test_torch_finds_schemas_fakes_and_gradients_in_order(double_quant, tokens):
    q, (a, b) = stored(double_quant), adapter()
    x, dy, xa = torch.randn(tokens, 64), torch.randn(tokens, 12), torch.randn(tokens, 3)
    bias, seed = torch.randn(12), torch.tensor(7)
    calls = [
        (ops.dequantize, (*ops.parts(q), torch.bfloat16)),
        (ops.linear, (x.requires_grad_(), bias.requires_grad_(), *ops.parts(q))),
        (ops.linear_grad, (dy, *ops.parts(q))),
        (ops.lora_linear, (x, a, b, 0.5, bias, 0.3, seed, *ops.parts(q))),
        (ops.lora_linear, (x, a, b, 0.5, None, 0.0, None, *ops.parts(q))),
        (ops.lora_linear_grad, (dy, xa, a.detach(), 0.3, seed, *ops.parts(q))),
        (ops.project_grad, (xa, x.detach(), 0.3, seed, torch.float32)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.known, arguments, test_utils=CHECKS)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_models_and_layers_compile():
    """In a process of their own: the check of shapes that other tests run under cannot be traced."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/compiled.py"]
    environment = {**os.environ, "QLORA_TEST_SHAPES": "unchecked"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_second_of_two_gradients_is_refused_not_wrong():
    q = stored()
    x = torch.randn(2, 64, requires_grad=True)
    (dx,) = torch.autograd.grad(kernels.nf4_linear(x, q).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


def test_the_first_row_that_accepts_is_taken_and_the_definition_takes_all():
    cpu = torch.device("cpu")
    for operator in {row.operator for row in dispatch.table()}:
        rows = [row for row in dispatch.table() if row.operator == operator]
        assert rows[-1].device == "any"
        assert rows[-1].accepts is dispatch.always
    few, many = torch.randn(1, 64), torch.randn(64, 64)
    names = [dispatch.form("matmul", cpu, x, stored()).__module__ for x in (few, many)]
    assert names == ["kernels.cpu", "kernels.dense"]
