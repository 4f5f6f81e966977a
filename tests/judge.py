"""float64 as the judge of 16-bit results, and fresh memory that shows when it was never written."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def errs_at_most_twice(ours: Tensor, torchs: Tensor, exact: Tensor) -> bool:
    """Whether our result is in torch's dtype and at most twice as far from float64 as torch's own.

    Sums in another order differ in float32's last digits, and there either may be the lucky one.
    """
    assert ours.dtype == torchs.dtype
    assert ours.shape == exact.shape
    last_digits = 1e-6 * (exact.norm() + exact.numel() ** 0.5)
    return bool((ours.double() - exact).norm() <= 2 * (torchs.double() - exact).norm() + last_digits)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that torch hands out unwritten is full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
