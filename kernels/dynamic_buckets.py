"""The nearest of the dynamic map's 256 entries by one look at a table and one comparison.

The sign, exponent and first seven bits of the mantissa of a float32 sort the ratios of a block into buckets, each so
narrow that at most one midpoint between entries lies in it. The table has the number of midpoints below a bucket;
whether the one inside lies below the ratio too is asked exactly, as value > midpoint * absmax in float64, where that
product of 28 and 24 bits needs no rounding. So the ratio that finds the bucket may be off by some roundings, and is: it
is a product with a reciprocal.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

from nf4.dynamic import entry_midpoints

SHIFT = 16  # bits of the mantissa that are left out
LOWEST = ((127 - 23) << 7) - 1  # bits of 2^-23, below which no midpoint lies; all smaller ratios share a bucket
BUCKETS = (127 << 7) - LOWEST + 1  # the last one begins at 1
SLACK = 2.0**-20  # share by which a computed ratio may be off; with a subnormal reciprocal it is off by 2^-21


@lru_cache
def bucket_tables(
    device: torch.device, signed: bool = True
) -> tuple[UInt8[Tensor, " buckets"], Float64[Tensor, "256"]]:
    """How many midpoints lie below each bucket, first of positive ratios and then of negative ones; and the midpoints.

    The last midpoint is infinite: nothing lies above the largest entry.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        midpoints = entry_midpoints(torch.device("cpu"), signed)
        edges = (torch.arange(LOWEST, LOWEST + BUCKETS + 1, dtype=torch.int32) << SHIFT).view(torch.float32).double()
        edges[0] = 0
        low, high = edges[:-1] * (1 - SLACK), edges[1:] * (1 + SLACK)
        lower, upper = torch.cat([low, -high]), torch.cat([high, -low])
        below = torch.searchsorted(midpoints, lower)
        assert int((torch.searchsorted(midpoints, upper) - below).max()) == 1
        midpoints = torch.cat([midpoints, midpoints.new_full((1,), math.inf)])
        return below.to(torch.uint8).to(device), midpoints.to(device)
