"""The products with many tokens: decode W once into a workspace, then one dense product.

Decoding costs as much as a product with some three hundred tokens, so from there on it is the faster way, and on
no device is there a faster dense product than the vendor's. The workspace is shared by all layers: W lives
there only until the product is done. The LoRA branch is added in place, without a second pass over the result.
M tokens, N outputs, K inputs, R rank.
"""

import threading

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kernels.dispatch import form
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
    dxa: Float[Tensor, "M R"], x: Float[Tensor, "M K"], dropout: float = 0.0, seed: int | None = None
) -> Float[Tensor, "R K"]:
    """(M, R), (M, K) -> (R, K): dA = dxa^T drop(x)."""
    return dxa.to(x.dtype).T @ drop(x, dropout, seed)


def drop(x: Float[Tensor, "M K"], dropout: float, seed: int | None) -> Float[Tensor, "M K"]:
    return form("drop", x.device, x)(x, dropout, seed) if dropout else x


workspaces = threading.local()  # one set for each thread, and in it one for each stream: products may overlap


def decoded(q: QuantizedTensor, dtype: torch.dtype) -> Float[Tensor, "N K"]:
    """W in the workspace of this device, stream and dtype; good until the next call."""
    device = q.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = workspaces.__dict__.setdefault("held", {})
    space = held.get((device, stream, dtype))
    if space is None or space.numel() < q.numel:
        with torch.inference_mode(False):
            space = held[device, stream, dtype] = torch.empty(q.numel, dtype=dtype, device=device)
    out = space[: q.numel].view(q.shape)
    return form("dequantize", device, q, dtype)(q, dtype, out=out)
