"""What tests of kernels on stored weights share: problems, float64 as the judge, poisoned memory, the dropout mask."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nf4 import QuantConfig, QuantizedTensor, dequantize, quantize

GUARD = 64  # numbers before and after a tensor that a kernel may fill


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(N: int, K: int, config: QuantConfig, seed: int = 0) -> QuantizedTensor:
    return quantize(normal(seed, N, K) / K**0.5, config)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is filled with NaN, and NaN around it must still be there at the end."""
    empty = torch.empty
    edges: list[tuple[Tensor, int]] = []

    def poisoned(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        count = int(np.prod(size))
        memory = empty(count + 2 * GUARD, dtype=dtype, device=device).fill_(torch.nan)
        edges.append((memory, count))
        return memory[GUARD : count + GUARD].view(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield
    for memory, count in edges:
        assert memory[:GUARD].isnan().all()
        assert memory[count + GUARD :].isnan().all()


def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
    """Run one program of a kernel."""
    kernel[1,](*arguments, **constants)


def judge(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """At most twice as far from float64 as torch in the same dtype, in all and at the worst entry."""
    assert ours.shape == torchs.shape
    assert ours.dtype == torchs.dtype
    assert ours.isfinite().all()
    our, their = (ours.double() - exact).abs(), (torchs.double() - exact).abs()
    assert our.norm() <= 2 * their.norm() + 1e-6 * exact.norm()
    if exact.numel():
        assert our.max() <= 3 * their.max() + 1e-2 * exact.abs().max()


def in_both(
    function: Callable[..., Tensor], q: QuantizedTensor, dtype: torch.dtype, *tensors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A function of the weight and tensors, in plain torch: in `dtype`, and in float64 on the same numbers."""
    own = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    exact = [None if tensor is None else tensor.double() for tensor in own]
    return function(dequantize(q, dtype), *own), function(dequantize(q, torch.float32).double(), *exact)


def philox(counters: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 of Salmon et al. 2011, counters (n, 4) -> (n, 4), with the two halves of the seed as its key."""
    c = [counters[:, i].astype(np.uint64) for i in range(4)]
    key, word = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint64(0xFFFFFFFF)
    for _ in range(10):
        even, odd = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high = np.uint64(32)
        c = [
            odd >> high ^ c[1] ^ np.uint64(key[0]),
            odd & word,
            even >> high ^ c[3] ^ np.uint64(key[1]),
            even & word,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, axis=1).astype(np.uint32)


def dropout_mask(shape: tuple[int, int], dropout: float, seed: int) -> Tensor:
    """Which entries stay."""
    return dropout_numbers(shape, seed) >= round(dropout * 2**16)


def dropout_numbers(shape: tuple[int, int], seed: int) -> Tensor:
    """16 bits for each entry, eight to a draw, low halves first."""
    count = shape[0] * shape[1]
    draw = np.arange(-(-count // 8), dtype=np.uint64)
    zero = np.zeros_like(draw)
    words = philox(np.stack([draw & np.uint64(0xFFFFFFFF), draw >> np.uint64(32), zero, zero], axis=1), seed)
    numbers = np.stack([words & 0xFFFF, words >> np.uint32(16)], axis=2).reshape(-1)[:count]
    return torch.from_numpy(numbers.astype(np.int64)).view(shape)
