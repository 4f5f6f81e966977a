"""Linear layers on a stored weight that never keep the weight itself.

Plain autograd would hold the dequantized W of every layer until its backward pass: the whole model in 16
bit. Here forward saves only what is stored anyway, and backward decodes W again; `kernels/ops.py` has the gradients.
M tokens, N outputs, K inputs, R rank.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kernels import ops
from kernels.reference import cast, check_linear, check_lora, rows
from nf4 import QuantizedTensor


def nf4_linear(
    x: Float[Tensor, "..."], q: QuantizedTensor, bias: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """(..., K) -> (..., N): y = x W^T + bias, where W = dequantize(q) is (N, K)."""
    check_linear(x, q, bias)
    y = ops.linear(rows(x), cast(bias, x.dtype), *ops.parts(q))
    return y.view(*x.shape[:-1], q.shape[0])


def nf4_lora_linear(
    x: Float[Tensor, "..."],
    q: QuantizedTensor,
    lora_a: Float[Tensor, "..."],
    lora_b: Float[Tensor, "..."],
    scaling: float,
    bias: Float[Tensor, "..."] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Float[Tensor, "..."]:
    """(..., K) -> (..., N): y = x W^T + bias + scaling (drop(x) A^T) B^T, where W = dequantize(q) is (N, K).

    The branch multiplies in x's dtype, whatever dtype the adapter is kept in. Dropout falls on the branch's
    input alone; the base layer sees all of x. Its mask follows from `seed`, drawn from torch's default
    generator if none is given.
    """
    check_lora(x, q, lora_a, lora_b, dropout, bias)
    drawn = None
    if dropout:
        drawn = torch.randint(2**63 - 1, ()) if seed is None else torch.tensor(seed)
    y, _ = ops.lora_linear(rows(x), lora_a, lora_b, scaling, cast(bias, x.dtype), dropout, drawn, *ops.parts(q))
    return y.view(*x.shape[:-1], q.shape[0])
