"""The products with many tokens: decode W once into a workspace, then one dense product.

Decoding costs as much as a dense product with a hundred tokens or two (on an H200), so beyond some tens of tokens it is
the faster way, and on no device is there a faster dense product than the vendor's. The workspace is shared by all
layers: W lives there only until the product is done. The LoRA branch is a small product added to the result; on a GPU
it is written first (see `expand`).
M tokens, N outputs, K inputs, R rank.
"""

import threading

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.dispatch import form
from kernels.planned import stream_of
from kernels.reference import cast
from nf4 import QuantizedTensor


def matmul(
    x: Float[Tensor, "M K"],
    q: QuantizedTensor,
    bias: Float[Tensor, " N"] | None = None,
    xa: Float[Tensor, "M R"] | None = None,
    lora_b: Float[Tensor, "N R"] | None = None,
    scaling: float = 1.0,
) -> Float[Tensor, "M N"]:
    """(M, K) -> (M, N): y = x W^T + bias + scaling xa B^T, where W = dequantize(q) is (N, K)."""
    y = F.linear(x, decoded(q, x.dtype), cast(bias, x.dtype))
    if xa is not None and lora_b is not None:
        y.addmm_(xa.to(x.dtype), lora_b.to(x.dtype).T, alpha=scaling)
    return y


def matmul_grad(
    dy: Float[Tensor, "M N"],
    q: QuantizedTensor,
    dxa: Float[Tensor, "M R"] | None = None,
    lora_a: Float[Tensor, "R K"] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Float[Tensor, "M K"]:
    """(M, N) -> (M, K): dx = dy W + drop(dxa A), with the mask that forward put on x."""
    W = decoded(q, dy.dtype)
    if dxa is None or lora_a is None:
        return dy @ W
    branch = dxa.to(dy.dtype) @ lora_a.to(dy.dtype)
    return drop(branch, dropout, seed).addmm_(dy, W)


def project(
    x: Float[Tensor, "M K"], lora_a: Float[Tensor, "R K"], dropout: float = 0.0, seed: int | None = None
) -> Float[Tensor, "M R"]:
    """(M, K) -> (M, R): xa = drop(x) A^T, multiplied in x's dtype."""
    return F.linear(drop(x, dropout, seed), lora_a.to(x.dtype))


def project_grad(
    dxa: Float[Tensor, "M R"],
    x: Float[Tensor, "M K"],
    dropout: float = 0.0,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "R K"]:
    """(M, R), (M, K) -> (R, K): dA = dxa^T drop(x), multiplied in x's dtype and rounded to `dtype` (x's)."""
    return (dxa.to(x.dtype).T @ drop(x, dropout, seed)).to(dtype or x.dtype)


def drop(x: Float[Tensor, "M K"], dropout: float, seed: int | None) -> Float[Tensor, "M K"]:
    return form("drop", x.device, x)(x, dropout, seed) if dropout else x


workspaces = threading.local()  # one set for each thread, and in it one for each stream: products may overlap


def decoded(q: QuantizedTensor, dtype: torch.dtype) -> Float[Tensor, "N K"]:
    """W in the workspace; good until the next call."""
    out = workspace(q.device, dtype, q.numel).view(q.shape)
    return form("dequantize", q.device, q, dtype)(q, dtype, out=out)


def workspace(device: torch.device, dtype: torch.dtype, numel: int) -> Float[Tensor, " numel"]:
    """Memory of this thread for this device, stream and dtype, as large as the largest that was asked for."""
    held = workspaces.__dict__.setdefault("held", {})
    stream = stream_of(device)
    space = held.get((device, stream, dtype))
    if space is None or space.numel() < numel:
        with torch.inference_mode(False):
            space = held[device, stream, dtype] = torch.empty(numel, dtype=dtype, device=device)
    return space[:numel]
