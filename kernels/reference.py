"""The definition of every operator, in plain torch.

What the fast forms compute must agree with this, forward and backward; here the gradients are autograd's own.
The shapes of what a caller passes are checked here and answered in words, so the signatures leave them open.
M tokens, N outputs, K inputs, R rank.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.planned import alike
from nf4 import QuantizedTensor, dequantize, quantize

__all__ = [
    "attention",
    "dequantize",
    "drop",
    "dropout_mask",
    "dropout_seed",
    "linear_cross_entropy",
    "matmul",
    "matmul_grad",
    "nf4_linear",
    "nf4_lora_linear",
    "project",
    "project_grad",
    "quantize",
    "rms_norm",
    "rotate",
    "swiglu",
]


def nf4_linear(
    x: Float[Tensor, "..."], q: QuantizedTensor, bias: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """(..., K) -> (..., N): y = x W^T + bias, where W = dequantize(q) is (N, K)."""
    check_linear(x, q, bias)
    return matmul(rows(x), q, bias).view(*x.shape[:-1], q.shape[0])


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
    input alone; the base layer sees all of x.
    """
    check_lora(x, q, lora_a, lora_b, dropout, bias)
    if dropout and seed is None:
        seed = dropout_seed()
    xa = project(rows(x), lora_a, dropout, seed)
    return matmul(rows(x), q, bias, xa, lora_b, scaling).view(*x.shape[:-1], q.shape[0])


# What the two consist of, forward and backward


def matmul(
    x: Float[Tensor, "M K"],
    q: QuantizedTensor,
    bias: Float[Tensor, " N"] | None = None,
    xa: Float[Tensor, "M R"] | None = None,
    lora_b: Float[Tensor, "N R"] | None = None,
    scaling: float = 1.0,
) -> Float[Tensor, "M N"]:
    """(M, K) -> (M, N): y = x W^T + bias + scaling xa B^T, where W = dequantize(q) is (N, K)."""
    y = F.linear(x, dequantize(q, x.dtype), cast(bias, x.dtype))
    return y if xa is None or lora_b is None else y + scaling * F.linear(xa.to(x.dtype), lora_b.to(x.dtype))


def matmul_grad(
    dy: Float[Tensor, "M N"],
    q: QuantizedTensor,
    dxa: Float[Tensor, "M R"] | None = None,
    lora_a: Float[Tensor, "R K"] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Float[Tensor, "M K"]:
    """(M, N) -> (M, K): dx = dy W + drop(dxa A), with the mask that forward put on x."""
    dx = dy @ dequantize(q, dy.dtype)
    return dx if dxa is None or lora_a is None else dx + drop(dxa.to(dy.dtype) @ lora_a.to(dy.dtype), dropout, seed)


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


# Dropout


def drop(x: Float[Tensor, "..."], dropout: float, seed: int | None) -> Float[Tensor, "..."]:
    """x with a share of its entries set to zero and the others scaled up, so that the mean stays."""
    if not dropout or seed is None:
        return x
    mask = dropout_mask(x.shape, dropout, seed, x.device)
    return torch.where(mask, x * (1 / (1 - dropout)), 0)


def dropout_mask(shape: tuple[int, ...], dropout: float, seed: int, device: torch.device) -> Bool[Tensor, "..."]:
    """Which entries stay: a function of the seed and an entry's position alone, so that nothing need keep it.

    Philox4x32-10 (Salmon et al., SC 2011) with the seed as its key hashes each number e // 8 to four 32-bit
    words. Word (e % 8) // 2 serves entry e: its low half if e is even, else its high half. An entry stays if that
    number is at least dropout * 2^16; so the share that is dropped is a multiple of 2^-16.
    """
    count = math.prod(shape)
    counter = torch.arange(-(-count // 8), device=device)
    words = torch.stack(philox(counter, seed), dim=-1)  # (counters, 4)
    numbers = torch.stack([words & 0xFFFF, words >> 16], dim=-1).view(-1)[:count]
    return (numbers >= threshold(dropout)).view(shape)


def philox(counter: Int[Tensor, " counters"], seed: int) -> tuple[Int[Tensor, " counters"], ...]:
    """Four 32-bit numbers for every counter, as int64."""
    word = [counter & MASK, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    key = [seed & MASK, seed >> 32 & MASK]
    for _ in range(10):
        (high0, low0), (high1, low1) = (wide_product(word[0], 0xD2511F53), wide_product(word[2], 0xCD9E8D57))
        word = [high1 ^ word[1] ^ key[0], low1, high0 ^ word[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return tuple(word)


MASK = 0xFFFFFFFF


def wide_product(a: Int[Tensor, " counters"], b: int) -> tuple[Int[Tensor, " counters"], Int[Tensor, " counters"]]:
    """High and low half of the 64-bit product of 32-bit numbers; int64 would overflow, so in two parts."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high << 16 | low & 0xFFFF) & MASK


def threshold(dropout: float) -> int:
    """The 16-bit number from which an entry stays."""
    return round(dropout * 2**16)


def dropout_seed() -> int:
    """A seed from torch's default generator, which checkpointing rewinds when it runs a layer again."""
    return int(torch.randint(2**63 - 1, ()))


# What is refused


def check_linear(x: Tensor, q: QuantizedTensor, bias: Tensor | None) -> None:
    if len(q.shape) != 2:
        raise ValueError(f"a linear layer's weight is (outputs, inputs) but this one has the shape {q.shape}")
    out_features, in_features = q.shape
    features = x.shape[-1] if x.ndim else 0
    if features != in_features or not x.ndim:
        raise ValueError(f"x has {features} features per token but the weight takes {in_features}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"the bias has the shape {tuple(bias.shape)} but the weight gives {out_features} outputs")
    check_devices(x, bias, *q.tensors().values())


def check_devices(x: Tensor, *others: Tensor | None) -> None:
    """Refuse tensors of two devices: an operator reads them by their addresses."""
    for other in others:
        if other is not None and not alike(other.device, x.device):
            raise ValueError(
                f"all tensors of an operator are on one device, but these are on {x.device} and {other.device}"
            )


def check_lora(
    x: Tensor, q: QuantizedTensor, lora_a: Tensor, lora_b: Tensor, dropout: float, bias: Tensor | None
) -> None:
    check_linear(x, q, bias)
    out_features, in_features = q.shape
    if lora_a.ndim != 2 or lora_a.shape[1] != in_features:
        raise ValueError(f"lora_a is {tuple(lora_a.shape)} but the weight takes (rank, {in_features})")
    if lora_b.shape != (out_features, lora_a.shape[0]):
        raise ValueError(
            f"lora_b is {tuple(lora_b.shape)} but the weight and lora_a take ({out_features}, {lora_a.shape[0]})"
        )
    check_devices(x, lora_a, lora_b)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is the share of inputs set to zero and must be in [0, 1), not {dropout}")


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def rows(x: Tensor) -> Tensor:
    """(..., C) -> (M, C): every token a row."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


# The layers around the products


def rms_norm(x: Float[Tensor, "..."], weight: Float[Tensor, "..."], eps: float) -> Float[Tensor, "..."]:
    """(..., D) -> (..., D): x / sqrt(mean(x²) + eps) * weight, with the statistics in float32."""
    check_norm(x, weight)
    h = x.to(wide(x.dtype))
    h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
    return (weight * h.to(x.dtype)).to(x.dtype)


def rotate(x: Float[Tensor, "..."], cos: Float[Tensor, "..."], sin: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """(B, H, T, C) -> (B, H, T, C): turn each pair of channels (c, c + C/2) by its angle, in float32.

    cos and sin are (B, 1, T, C/2), or have 1 for B. They are constants: no gradient flows to them.
    """
    check_rotation(x, cos, sin)
    cos, sin = cos.detach(), sin.detach()
    first, second = x.to(wide(x.dtype)).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attention(q: Float[Tensor, "..."], k: Float[Tensor, "..."], v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """(B, H, T, C) -> (B, H, T, C): softmax(q k^T / sqrt(C)) v over the tokens up to each query.

    k and v are (B, K, T, C): every H / K query heads share one of keys and values.
    """
    check_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def swiglu(gate: Float[Tensor, "..."], up: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """silu(gate) * up, entry by entry, where silu(g) = g / (1 + exp(-g))."""
    check_gate(gate, up)
    return F.silu(gate) * up


def linear_cross_entropy(
    hidden: Float[Tensor, "..."],
    weight: Float[Tensor, "..."],
    targets: Int[Tensor, "..."],
    ignore_index: int = -100,
    *,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """Cross-entropy of each target, in nats and float32, under the logits hidden weight^T.

    hidden is (L, D), weight (V, D), targets (L). Targets equal to `ignore_index` are not scored. "mean" is over those
    that are (NaN if none is); "none" gives the loss of each target, 0 where it is not scored.
    """
    check_cross_entropy(hidden, weight, targets, reduction)
    check_targets(targets, weight.shape[0], ignore_index)
    logits = F.linear(hidden, weight)
    return F.cross_entropy(
        logits.to(wide(logits.dtype)), targets.long(), ignore_index=ignore_index, reduction=reduction
    )


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over values of `dtype` are kept in: float32, or more where the values have more."""
    return torch.promote_types(dtype, torch.float32)


def check_norm(x: Tensor, weight: Tensor) -> None:
    if not x.ndim or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"the norm's weight has one entry per feature, but it is {tuple(weight.shape)} and x is {tuple(x.shape)}"
        )
    check_devices(x, weight)


def check_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"rotated are (B, H, T, C) with an even number C of channels, not {tuple(x.shape)}")
    B, _, T, C = x.shape
    if cos.shape != sin.shape or cos.shape not in ((B, 1, T, C // 2), (1, 1, T, C // 2)):
        raise ValueError(
            f"cos and sin of x {tuple(x.shape)} are ({B}, 1, {T}, {C // 2}) or have 1 for {B}, "
            f"not {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    check_devices(x, cos, sin)


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
    if not fits or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q is (B, H, T, C), k and v are (B, K, T, C) and K divides H, "
            f"but they are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    check_devices(q, k, v)


def check_gate(gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up agree in shape and dtype, but they are {tuple(gate.shape)} {gate.dtype} "
            f"and {tuple(up.shape)} {up.dtype}"
        )
    check_devices(gate, up)


def check_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is (L, D) and weight (V, D), but they are {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"there is one target per row of hidden {tuple(hidden.shape)}, not {tuple(targets.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight have one dtype, but they are {hidden.dtype} and {weight.dtype}")
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction is "mean" or "none", not {reduction!r}')
    check_devices(hidden, weight, targets)


def check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))]
    if wrong.numel():
        raise ValueError(
            f"targets are {ignore_index} (not scored) or in [0, {vocabulary}), the size of the vocabulary, "
            f"but one is {int(wrong[0])}"
        )
