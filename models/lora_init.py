"""Starts for adapters that take their share of the weight: PiSSA and LoftQ. The base becomes what they leave of it.

PiSSA (Meng et al. 2024) gives the adapter the largest singular triplets of the weight, so that what is trained is
what matters most, and the base keeps the rest; quantized, that rest loses less than the whole weight would. LoftQ (Li
et al. 2023) gives the adapter the best low-rank approximation of what quantization loses, and quantizes again what is
then left, in turn; errors need not fall in every round, so the best round is kept. Over a dense base PiSSA is the same
without quantization, and LoftQ leaves the values that the default 4-bit format can store.

A and B are rounded to their dtype first, so that the base makes up for that too. Everything is a function of the
weight alone: who has the checkpoint can make the same base again, and no random generator is touched.

Letters: N outputs, K inputs, R rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

import kernels
from models.linear import AdaptableLinear, NF4Linear
from models.lora_config import LoraConfig
from models.originals import Originals
from models.parallel import shares
from nf4 import QuantConfig, QuantizedTensor

LOFTQ_ROUNDS = 5  # the paper's 1 to 5; most of the gain is in the first
EXACT_UP_TO = 1024  # a full decomposition of a weight with more rows and columns takes minutes on a CPU
POWER_ITERATIONS = 8  # spectra of weights fall slowly; with 8 the triplets hold all but 1e-3 of what the exact ones do

NAMES = {"pissa": "PiSSA", "loftq": "LoftQ"}


def starting_weights(
    model: nn.Module, layers: Mapping[str, AdaptableLinear], config: LoraConfig
) -> Callable[[str], Tensor] | None:
    """Where `divided` gets its weights from; None for the default start, which needs none."""
    if config.init == "default":
        return None
    purpose = NAMES[config.init]
    for name, layer in layers.items():
        rank, _ = config.size(name)
        if rank > min(layer.in_features, layer.out_features):
            raise ValueError(
                f"lora: {purpose} takes {rank} singular vectors from {name}, which has "
                f"{min(layer.in_features, layer.out_features)}; lower the rank, or set one in rank_pattern"
            )
    return Originals(model, layers, purpose)


class Start(NamedTuple):
    """What a layer starts with."""

    base: Tensor | QuantizedTensor
    """The weight in the layer's own form."""
    a: Float[Tensor, "R K"]
    b: Float[Tensor, "N R"]


@torch.no_grad()
def divided(layer: AdaptableLinear, weight: Float[Tensor, "N K"], init: str) -> Start:
    """Share `weight` between the layer's base and its adapter, which has its sizes and no values yet."""
    assert layer.lora_A is not None
    rank, dtype = layer.lora_A.out_features, layer.lora_A.weight.dtype
    if init == "pissa":
        a, b = leading(weight, rank, layer.scaling, dtype)
        rest = weight - product(a, b, layer.scaling)
        return Start(stored(layer, rest) if isinstance(layer, NF4Linear) else rest.to(layer.dtype), a, b)
    q, a, b = loftq(layer, weight, rank, dtype)
    return Start(q if isinstance(layer, NF4Linear) else kernels.dequantize(q), a, b)


def take(layer: AdaptableLinear, start: Start | None, source: int | None = None) -> None:
    """Start the layer so; `source` is as in `shares.put`."""
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    base, a, b = start or (None, None, None)
    layer.refill(base, source)
    shares.put(layer.lora_A.weight, a, source)
    shares.put(layer.lora_B.weight, b, source)


def loftq(
    layer: AdaptableLinear, weight: Float[Tensor, "N K"], rank: int, dtype: torch.dtype
) -> tuple[QuantizedTensor, Float[Tensor, "R K"], Float[Tensor, "N R"]]:
    """The base to store, A and B of the round that comes closest to the weight."""
    found, least = None, float("inf")
    branch = torch.zeros_like(weight)
    for _ in range(LOFTQ_ROUNDS):
        q = stored(layer, weight - branch)
        lost = weight - kernels.dequantize(q).float()
        a, b = leading(lost, rank, layer.scaling, dtype)
        branch = product(a, b, layer.scaling)
        error = float((lost - branch).norm())
        if error < least:
            found, least = (q, a, b), error
    assert found is not None
    return found


def leading(
    weight: Float[Tensor, "N K"], rank: int, scaling: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "R K"], Float[Tensor, "N R"]]:
    """A and B for which scaling B A is the closest to the weight that this rank allows."""
    u, s, v = triplets(weight, rank)
    root = (s / scaling).sqrt()
    return (root[:, None] * v.T).to(dtype), (u * root).to(dtype)


def triplets(
    weight: Float[Tensor, "N K"], rank: int
) -> tuple[Float[Tensor, "N R"], Float[Tensor, " R"], Float[Tensor, "K R"]]:
    """The largest singular values with their vectors; of a large weight by iteration on a random subspace."""
    if min(weight.shape) <= EXACT_UP_TO:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].T
    width = min(2 * rank + 8, *weight.shape)
    random = torch.randn(weight.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(weight @ random.to(weight.device)).Q  # (N, width)
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], vh[:rank].T


def product(a: Float[Tensor, "R K"], b: Float[Tensor, "N R"], scaling: float) -> Float[Tensor, "N K"]:
    return scaling * (b.float() @ a.float())


def stored(layer: AdaptableLinear, weight: Float[Tensor, "N K"]) -> QuantizedTensor:
    """The weight in the layer's own 4-bit format, or the default one for a dense layer, decoding to its dtype."""
    config = layer.quant_config if isinstance(layer, NF4Linear) else QuantConfig()
    return replace(kernels.quantize(weight, config), dtype=layer.dtype)
