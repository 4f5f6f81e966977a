"""Cross-entropy over a large vocabulary that never holds all logits.

With a vocabulary of 50 000 the logits of one step are the largest tensor in training a small model, and their
gradient is as large again. But a loss needs one row of logits at a time. So a few hundred tokens go through the head
at once, and while their logits are there, their gradient is written over them and multiplied into the gradients
of hidden and weight. Backward has nothing left to do but scale. A frozen head gets no gradient and costs none.
L tokens, D width, V vocabulary.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.planned import kind_of
from kernels.reference import check_targets, wide

# Logits held at once. On a CPU a product of 256 tokens is as fast as one of all (vocabulary 49152, measured); a GPU
# wants some hundreds of tokens even with a vocabulary of 128 000.
CHUNK_BYTES = {"cpu": 24 * 2**20}
CHUNK_BYTES_ELSEWHERE = 128 * 2**20
ROW_BYTES = 4 * 2**20  # float32 probabilities held at once: they should stay in the cache


def linear_cross_entropy(
    hidden: Float[Tensor, "L D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " L"],
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    cross_entropy: Callable[[Tensor, Tensor, int, bool], Tensor] | None = None,
) -> tuple[Float[Tensor, " L"], Float[Tensor, "L D"] | None, Float[Tensor, "V D"] | None]:
    """The loss of each target, and the gradients of their sum: of hidden, and in float32 of the weight.

    The sum's, not the mean's: float16 would lose small gradients divided by the number of targets.
    """
    with torch.no_grad():
        (L, _), V = hidden.shape, weight.shape[0]
        check_targets(targets, V, ignore_index)
        losses = hidden.new_empty(L, dtype=wide(hidden.dtype))
        dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else None
        dweight = torch.zeros(weight.shape, dtype=losses.dtype, device=weight.device) if need_weight else None

        size = min(chunk_size(V, hidden.element_size(), hidden.device), L)
        space = hidden.new_empty(size, V)
        for start in range(0, L, size or 1):
            chunk = slice(start, start + size)
            logits = torch.mm(hidden[chunk], weight.T, out=space[: L - start])
            form = cross_entropy or rows_cross_entropy
            losses[chunk] = form(logits, targets[chunk], ignore_index, need_hidden or need_weight)
            if dhidden is not None:
                torch.mm(logits, weight, out=dhidden[chunk])  # logits: by now their gradient
            if dweight is not None:
                add_product(dweight, logits, hidden[chunk])
        return losses, dhidden, dweight


def chunk_size(V: int, element_size: int, device: torch.device) -> int:
    """Tokens per chunk: a multiple of 16, and 16 at least."""
    rows = CHUNK_BYTES.get(kind_of(device), CHUNK_BYTES_ELSEWHERE) // max(V * element_size, 1)
    return max(rows // 16 * 16, 16)


def rows_cross_entropy(
    logits: Float[Tensor, "L V"], targets: Int[Tensor, " L"], ignore_index: int, gradient: bool
) -> Float[Tensor, " L"]:
    """The loss of each row; with `gradient`, the logits become the gradient of their loss."""
    L, V = logits.shape
    dtype = wide(logits.dtype)
    losses = logits.new_empty(L, dtype=dtype)
    scored = targets != ignore_index
    index = torch.where(scored, targets, 0).long()[:, None]  # (L, 1)
    size = max(ROW_BYTES // (V * dtype.itemsize), 1)
    for start in range(0, L, size):
        rows = slice(start, start + size)
        log_p = torch.log_softmax(logits[rows], dim=1, dtype=dtype)
        losses[rows] = -log_p.gather(1, index[rows])[:, 0]
        if gradient:
            p = log_p.exp_()
            p.scatter_add_(1, index[rows], p.new_full((1, 1), -1).expand(len(p), 1))
            logits[rows] = p
    if gradient:
        logits[~scored] = 0
    return losses.masked_fill_(~scored, 0)


def add_product(dweight: Float[Tensor, "V D"], dlogits: Float[Tensor, "L V"], hidden: Float[Tensor, "L D"]) -> None:
    """dweight += dlogits^T hidden, summed over all chunks in float32."""
    if dweight.dtype == hidden.dtype:
        dweight.addmm_(dlogits.T, hidden)
        return
    size = 8192  # outputs at a time: the rounded product of a chunk need not be whole either
    for part, columns in zip(dweight.split(size), dlogits.split(size, dim=1), strict=True):
        part += columns.T @ hidden
