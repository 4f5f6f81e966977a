"""What an optimizer does to parameters in one step, in plain torch: the definition of AdamW and Lion.

An update takes many tensors at once: contiguous parameters and gradients of any shape, flat states, and `Numbers`,
which are the hyperparameters of this step. It works in place, in float32, in the order of operations
written here, each of which is rounded; a parameter in 16 bits is rounded once, when it is stored. States are float32,
or 8-bit codes of the dynamic map with a float32 absmax for every 256 (arXiv:2110.02861): decoded, updated, and encoded
again to the exact nearest entries. Only elements of one block of 256 know of one another, so that tensors may be cut at
any multiple of 256 without changing a bit.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nf4 import dequantize_dynamic, quantize_dynamic

STATE_BLOCK = 256  # states that share a scale
PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Tensors = Sequence[Tensor]


class AdamWNumbers(NamedTuple):
    """Decoupled weight decay and bias correction, worked out in float64 for one tensor in one step."""

    beta1: float
    beta2: float
    step_size: float
    """Learning rate over 1 - beta1^t."""
    correction: float
    """Root of 1 - beta2^t."""
    eps: float
    decay: float
    """1 - learning rate * weight decay."""

    @classmethod
    def of(cls, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> "AdamWNumbers":
        """The numbers of step `step`, counted from 1."""
        beta1, beta2 = betas
        step_size, correction = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
        return cls(beta1, beta2, step_size, correction, eps, 1 - lr * weight_decay)


class LionNumbers(NamedTuple):
    """What Lion needs of one tensor in one step."""

    beta1: float
    beta2: float
    lr: float
    decay: float
    """1 - learning rate * weight decay."""


@torch.no_grad()
def adamw(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, numbers: Sequence[AdamWNumbers]
) -> None:
    """AdamW (Loshchilov and Hutter 2019) with float32 states."""
    for p, g, m, v, n in zip(params, grads, exp_avgs, exp_avg_sqs, numbers, strict=True):
        flat = p.view(-1)
        flat.copy_(adamw_step(flat.float(), g.view(-1).float(), m, v, n))


@torch.no_grad()
def adamw_8bit(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_absmaxes: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_sq_absmaxes: Tensors,
    numbers: Sequence[AdamWNumbers],
) -> None:
    """The same with states of 8 bits: signed entries for the mean of gradients, unsigned ones for that of squares."""
    tensors = (params, grads, exp_avgs, exp_avg_absmaxes, exp_avg_sqs, exp_avg_sq_absmaxes, numbers)
    for p, g, m_codes, m_absmax, v_codes, v_absmax, n in zip(*tensors, strict=True):
        m = dequantize_dynamic(m_codes, m_absmax, STATE_BLOCK)
        v = dequantize_dynamic(v_codes, v_absmax, STATE_BLOCK, signed=False)
        flat = p.view(-1)
        flat.copy_(adamw_step(flat.float(), g.view(-1).float(), m, v, n))
        for codes, absmax, state, signed in ((m_codes, m_absmax, m, True), (v_codes, v_absmax, v, False)):
            new_codes, new_absmax = quantize_dynamic(state, STATE_BLOCK, signed)
            codes.copy_(new_codes)
            absmax.copy_(new_absmax)


def adamw_step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, n: AdamWNumbers) -> Tensor:
    """The parameter after the step, in float32; m and v are updated in place."""
    m.mul_(n.beta1).add_(g * (1 - n.beta1))
    v.mul_(n.beta2).add_(g * g * (1 - n.beta2))
    # A root in float64 rounds to that of float32, where torch's own may be off by a bit; and torch divides by a number
    # on a CPU, but multiplies by its reciprocal on a GPU.
    root = v.double().sqrt().float()
    denominator = root.mul_(1 / n.correction).add_(n.eps)
    return p * n.decay - m / denominator * n.step_size


@torch.no_grad()
def lion(params: Tensors, grads: Tensors, exp_avgs: Tensors, numbers: Sequence[LionNumbers]) -> None:
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of an average decides, one state remembers."""
    for p, g, m, n in zip(params, grads, exp_avgs, numbers, strict=True):
        flat, g = p.view(-1), g.view(-1).float()
        direction = (m * n.beta1 + g * (1 - n.beta1)).sign()
        flat.copy_(flat.float() * n.decay - direction * n.lr)
        m.mul_(n.beta2).add_(g * (1 - n.beta2))
