"""Error feedback: columns are rounded one after the other, and those to come make up for each one's error.

Rounding every weight to its nearest level is best for the weights and not for what the layer computes: inputs are
correlated, so an error in one column can be undone by shifting others. Frantar et al. (GPTQ, 2023, arXiv:2210.17323)
give the shift. With U^T U = H^-1, U upper triangular (`nf4.inputs`), for every column j from the left

    error = (w_j - rounded w_j) / U_jj        w_k -= error U_jk    for all k > j

and trace(E H E^T) becomes the sum of all squared errors. Rows do not know of each other: all of them are done at once.

There columns share a scale with whole columns; here a scale belongs to a block along the flattened weight. A block's
scale is chosen just before its first weight is rounded, for its weights as they have been shifted by then, with
importance 1 / U_jj^2: what an error in that column will cost when all later columns have done what they can. Where
rows are not a whole number of blocks, a block begins at the end of one row and goes on in the next. It is then chosen
at the first of its columns, for the weights as they are then; the same rule holds for blocks of any length.

Shifts for columns far to the right are saved up and applied together, as one product of matrices, whenever the next
scales are to be chosen.

Letters: N outputs, K inputs.
"""

from itertools import pairwise

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from nf4.codebook import ascending
from nf4.config import QuantConfig
from nf4.scales import ChosenScales
from nf4.search import search_blocks

MOST_COLUMNS = 128  # whose shifts wait to be applied to the rest


def with_feedback(
    weight: Float32[Tensor, "N K"], factor: Float32[Tensor, "K K"], scales: ChosenScales, config: QuantConfig
) -> UInt8[Tensor, "N K"]:
    """Choose scale and codes of every block; what comes back counts levels of the codebook from the lowest."""
    name, block_size = config.codebook, config.block_size
    N, K = weight.shape
    device = weight.device
    work = weight.clone()
    flat = work.view(-1)
    levels, _ = (table.to(device) for table in ascending(name))
    midpoints = (levels[:-1] + levels[1:]) / 2
    spread = factor.diagonal().square().reciprocal()  # (K,)
    first_column = first_columns(N, K, block_size, device)
    rows = torch.arange(N, device=device) * K
    found = torch.empty(K, N, dtype=torch.uint8, device=device)

    for start, stop in runs(first_column, K):
        chosen = (first_column == start).nonzero()[:, 0]
        if len(chosen):
            place = chosen[:, None] * block_size + torch.arange(block_size, device=device)  # (blocks, block_size)
            inside = place < len(flat)
            place = place.clamp_max(len(flat) - 1)
            blocks = torch.where(inside, flat[place], 0)
            wished = blocks.abs().amax(1)
            if config.scale == "search":
                wished = search_blocks(blocks, wished, name, torch.where(inside, spread[place % K], 0))
            scales.put(chosen, wished)
        part = work[:, start:stop].T.contiguous()  # (columns, N)
        errors = torch.empty_like(part)
        for j in range(stop - start):
            scale = scales.decoded[(rows + (start + j)) // block_size]
            safe = torch.copysign(scale.abs().clamp_min(1e-38), scale)
            index = torch.bucketize(part[j] / safe, midpoints)
            found[start + j] = index
            errors[j] = (part[j] - levels[index] * scale) / factor[start + j, start + j]
            part[j + 1 :].addr_(factor[start + j, start + j + 1 : stop], errors[j], alpha=-1)
        work[:, stop:].addmm_(errors.T, factor[start:stop, stop:], alpha=-1)
    return found.T.contiguous()


def first_columns(N: int, K: int, block_size: int, device: torch.device) -> Int64[Tensor, " num_blocks"]:
    """The leftmost column in which each block has a weight.

    >>> first_columns(2, 6, 4, torch.device("cpu"))  # the second block ends row 0 and begins row 1
    tensor([0, 0, 2])
    """
    start = torch.arange(0, N * K, block_size, device=device)
    last = (start + block_size).clamp_max(N * K) - 1
    return torch.where(start // K == last // K, start % K, 0)


def runs(first_column: Int64[Tensor, " num_blocks"], K: int) -> list[tuple[int, int]]:
    """Columns to be rounded without choosing scales in between, from and to."""
    edges = sorted({*first_column.unique().tolist(), *range(0, K, MOST_COLUMNS), K})
    return list(pairwise(edges))
