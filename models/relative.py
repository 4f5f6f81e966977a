"""Relative positions, and what hides a token from attention: what T5 adds to its scores.

A head knows positions only by a learned number for each bucket of distances: near distances have buckets of their own,
far ones share. Axes: B batch, U queries, S tokens that are attended to, T tokens that an encoder has read.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def position_buckets(
    distances: Int[Tensor, "U S"], num_buckets: int, max_distance: int, bidirectional: bool
) -> Int[Tensor, "U S"]:
    """The bucket of each distance from a token to one that it attends to, negative where that stands before it.

    Half of the buckets hold one distance each; the logarithm spreads those up to `max_distance` over the others, and
    the last one has all beyond. The encoder spends half of them all on what comes after. Buckets are made in float32
    and on the CPU, as distances lie exactly on their borders: another logarithm would put some into the next one.
    """
    sides = 2 if bidirectional else 1
    count = num_buckets // sides
    single = count // 2
    steps = torch.arange(single, max_distance, device="cpu").float() / single
    shared = single + (steps.log() / math.log(max_distance / single) * (count - single)).long()
    bucket_of = torch.cat([torch.arange(single, device="cpu"), shared, torch.tensor([count], device="cpu")])
    bucket_of = bucket_of.clamp(max=count - 1).to(distances.device)

    far = distances.abs() if bidirectional else (-distances).clamp(min=0)
    after = count * (distances > 0) if bidirectional else 0
    return bucket_of[far.clamp(max=max_distance)] + after


def padding_bias(present: Bool[Tensor, "B T"], dtype: torch.dtype) -> Float[Tensor, "B 1 1 T"]:
    """Nothing for the scores of tokens that are there, and what hides them for padding."""
    return torch.zeros_like(present, dtype=dtype).masked_fill(~present, lowest(dtype))[:, None, None]


def lowest(dtype: torch.dtype) -> float:
    """A score that no softmax gives weight to.

    It is finite, so that a row that may see nothing is a mean and not NaN, and far enough from the largest number
    for a kernel to multiply it by log2(e).
    """
    return torch.finfo(dtype).min / 2
