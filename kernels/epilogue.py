"""What follows the main loop of a product: the parts of a split sum, then bias and the LoRA branch.

A weight of 4096 x 4096 makes 32 tiles, a quarter of what keeps a large GPU busy. So the programs of a tile split its
sum between them, each writes its part in float32 and counts itself in; the last one to arrive adds up all parts, in
their order, and goes on to the result. The order of addition does not depend on who was last, so that the same input
gives the same bits each time, which atomic additions would not; and unlike a second kernel it is one launch. The last
one also puts the counter back to zero, so that counters are made once for a stream and not once for a call.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from jaxtyping import Int32
from torch import Tensor

from kernels.planned import PROCESSORS


def split(tiles: int, rounds: int, device: torch.device, resident: int = 2) -> tuple[int, int]:
    """Into how many parts a loop of `rounds` is split, and rounds of a part: no more programs than run at once.

    One more, and it would start when the others are done. In less than eight rounds there is little but filling the
    pipeline: on an H200 a token times 4096 x 4096 took 11.8 us in 8 parts of 8 rounds, 12.7 in 16 of 4.
    """
    wanted = resident * processors(device) // tiles
    length = -(-rounds // max(min(wanted, rounds // 8), 1))
    return -(-rounds // length), length


@lru_cache
def processors(device: torch.device) -> int:
    if device.type == "meta":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def arrivals(tiles: int, device: torch.device) -> Int32[Tensor, " tiles"]:
    """A counter at zero for each tile."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(tiles, dtype=torch.int32, device=device)  # a graph may run beside others: its own
    stream = torch.cuda.current_stream(device).cuda_stream
    held = COUNTERS.get((device, stream))
    if held is None or len(held) < tiles:
        held = torch.zeros(max(tiles, 4096), dtype=torch.int32, device=device)
        COUNTERS[device, stream] = held
    return held


# By stream: kernels of one stream run one after the other, so each finds the zeros that the one before it left.
COUNTERS: dict[tuple[torch.device, int], Tensor] = {}


@triton.jit
def arrive_last(acc, place, mask, partial_ptr, arrived_ptr, tile, part, parts, SIZE: tl.constexpr):
    """Write one part of a tile's sum, SIZE numbers; whether all other parts were there already."""
    at = partial_ptr + (tile.to(tl.int64) * parts + part) * SIZE
    tl.store(at + place, acc, mask=mask)
    tl.debug_barrier()  # all threads have written before one of them counts this program in
    return tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == parts - 1


@triton.jit
def sum_of_parts(acc, place, mask, partial_ptr, arrived_ptr, tile, parts, SIZE: tl.constexpr):
    """All parts of a tile, in order; the tile's counter is put back to zero."""
    # Loads that are on their way at once, as registers allow.
    AT_ONCE: tl.constexpr = 4 if SIZE <= 2048 else 1  # pyrefly: ignore[bad-assignment]
    at = partial_ptr + tile.to(tl.int64) * parts * SIZE + place
    acc = tl.zeros_like(acc)
    for _ in tl.range(0, parts, num_stages=1, loop_unroll_factor=AT_ONCE):
        acc += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")  # past the first cache: others wrote it
        at += SIZE
    tl.store(arrived_ptr + tile, 0)
    return acc


@triton.jit
def complete(
    acc,
    m,
    n,
    bias_ptr,
    xa_ptr,
    lora_b_ptr,
    scaling,
    y_ptr,
    partial_ptr,
    arrived_ptr,
    M,
    N,
    R,
    parts,
    BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """What both forms of x W^T do with a tile of y^T (BLOCK_N, BLOCK_M), the whole sum or part program_id(2) of it."""
    if SPLIT:
        BLOCK_N: tl.constexpr = acc.shape[0]
        BLOCK_M: tl.constexpr = acc.shape[1]
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        own = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
        place = tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        used = (m < M)[None, :] & (n < N)[:, None]
        if arrive_last(acc, place, used, partial_ptr, arrived_ptr, own, tl.program_id(2), parts, SIZE):
            acc = sum_of_parts(acc, place, used, partial_ptr, arrived_ptr, own, parts, SIZE)
            finish(acc, m, n, bias_ptr, xa_ptr, lora_b_ptr, scaling, y_ptr, M, N, R, BIAS, BLOCK_R)
    else:
        finish(acc, m, n, bias_ptr, xa_ptr, lora_b_ptr, scaling, y_ptr, M, N, R, BIAS, BLOCK_R)


@triton.jit
def finish(acc, m, n, bias_ptr, xa_ptr, lora_b_ptr, scaling, y_ptr, M, N, R, BIAS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Add bias (N,) and scaling * xa (M, R) lora_b (N, R)^T to y^T (BLOCK_N, BLOCK_M), and store it in y (M, N)."""
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    n_ok, m_ok = n < N, m < M
    if BLOCK_R != 0:
        r = tl.arange(0, BLOCK_R)
        inner = xa_ptr + m.to(tl.int64)[None, :] * R + r[:, None]
        outer = lora_b_ptr + n.to(tl.int64)[:, None] * R + r[None, :]
        for r0 in tl.range(0, R, BLOCK_R, num_stages=1):
            xa = tl.load(inner + r0, mask=m_ok[None, :] & (r0 + r < R)[:, None], other=0.0).to(DTYPE)
            lora_b = tl.load(outer + r0, mask=n_ok[:, None] & (r0 + r < R)[None, :], other=0.0).to(DTYPE)
            acc += scaling * tl.dot(lora_b, xa, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(DTYPE).to(tl.float32)[:, None]
    y = y_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y, acc.to(DTYPE), mask=m_ok[None, :] & n_ok[:, None])
