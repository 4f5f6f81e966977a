"""How both forms of x W^T + bias + scaling xa B^T are launched: one signature, one grid, one list of what is shipped.

M tokens, N outputs, K inputs, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.decode import STORED, constants, stored
from kernels.dispatch import form
from kernels.epilogue import arrivals, split
from kernels.launch import Launch, Shipped
from nf4 import QuantConfig, QuantizedTensor

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def launch_product(
    kernel: Any,
    launch: Launch,
    scaled: bool,
    x: Float[Tensor, "M K"],
    q: QuantizedTensor,
    bias: Float[Tensor, " N"] | None,
    xa: Float[Tensor, "M R"] | None,
    lora_b: Float[Tensor, "N R"] | None,
    scaling: float,
) -> Float[Tensor, "M N"]:
    """Allocate y and run a kernel; `scaled` says whether it multiplies levels by scales (or sums, later)."""
    (M, K), N = x.shape, q.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if not M:
        return y
    x = x.contiguous()
    fixed = constants(q.config, x.dtype, scaled)
    block_m, block_n = launch.constants["BLOCK_M"], launch.constants["BLOCK_N"]
    across, down = -(-M // block_m), -(-N // block_n)
    parts, rounds = split(across * down, K // fixed["GROUP"], x.device, launch.resident)
    partial, arrived = y, y  # not used in a single part
    if parts > 1:
        partial = torch.empty(across * down * parts * block_m * block_n, dtype=torch.float32, device=x.device)
        arrived = arrivals(across * down, x.device)
    R = 0 if xa is None else xa.shape[1]
    kernel[across, down, parts](
        x,
        *stored(q, x.dtype),
        x if bias is None else bias.contiguous(),
        x if xa is None else xa.contiguous(),
        x if lora_b is None else lora_b.contiguous(),
        float(scaling),
        y,
        partial,
        arrived,
        M,
        N,
        K,
        R,
        parts,
        rounds,
        **launch.options(BIAS=bias is not None, BLOCK_R=rank_block(R), SPLIT=parts > 1, **fixed),
    )
    return y


def launches(tokens: tuple[int, ...], outputs: tuple[int, ...]) -> list[Launch]:
    """Launches worth timing for tiles of these sizes."""
    tiles = [{"BLOCK_M": m, "BLOCK_N": n} for m in tokens for n in outputs]
    return [Launch(tile, warps, stages) for tile in tiles for warps in (4, 8) for stages in (2, 3, 4, 5)]


def operands(M: int, device: str = "cuda") -> tuple[Float[Tensor, "M K"], QuantizedTensor]:
    """Tokens and a stored weight as a 7B model has them, for timing."""
    x = torch.randn(M, 4096, dtype=torch.bfloat16, device=device)
    return x, form("quantize", x.device, x, QuantConfig())(torch.randn(4096, 4096, device=device), QuantConfig())


def product_trial(kernel: Any, launch: Launch, scaled: bool, M: int) -> Callable[[], Tensor]:
    """A call that multiplies M tokens so, for `benchmarks/tune.py`."""
    x, q = operands(M)
    return lambda: launch_product(kernel, launch, scaled, x, q, None, None, None, 1.0)


def rank_block(R: int) -> int:
    """Ranks of the LoRA branch multiplied at once; 0 without one."""
    return min(max(1 << (R - 1).bit_length(), 16), 64) if R else 0


def shipped_product(
    name: str, kernel: Any, launch: Launch, scaled: bool, instructions: dict[int, float]
) -> list[Shipped]:
    """A launch in its usual form, whose instructions are counted, and in forms that differ from it in all else."""
    usual = variant(name, kernel, launch, scaled, torch.bfloat16, QuantConfig(), True, instructions)
    plain = QuantConfig("fp4", double_quant=False)
    small = QuantConfig("int4", block_size=32)
    return [
        usual,
        variant(name, kernel, launch, scaled, torch.float16, plain, False, {}),
        variant(name, kernel, launch, scaled, torch.bfloat16, small, True, {}),
    ]


def variant(
    name: str,
    kernel: Any,
    launch: Launch,
    scaled: bool,
    dtype: torch.dtype,
    config: QuantConfig,
    full: bool,
    instructions: dict[int, float],
) -> Shipped:
    """One configuration; `full` has a split sum, a bias and a LoRA branch."""
    type_, fixed = TYPES[dtype], constants(config, dtype, scaled)
    block_m, block_n = launch.constants["BLOCK_M"], launch.constants["BLOCK_N"]
    adapter = "*fp32" if full else f"*{type_}"
    signature = {
        "x_ptr": f"*{type_}",
        **STORED,
        "scales_ptr": "*u8" if config.double_quant else "*fp32",
        "bias_ptr": f"*{type_}",
        "xa_ptr": f"*{type_}",
        "lora_b_ptr": adapter,
        "scaling": "fp32",
        "y_ptr": f"*{type_}",
        "partial_ptr": "*fp32" if full else f"*{type_}",
        "arrived_ptr": "*i32" if full else f"*{type_}",
        **dict.fromkeys(("M", "N", "K", "R", "parts", "rounds"), "i32"),
    }
    flags = {"BIAS": full, "BLOCK_R": 16 if full else 0, "SPLIT": full}
    return Shipped(
        name=f"{name} {block_m}x{block_n} {type_} {config.codebook} block {config.block_size}{' full' * full}",
        kernel=kernel,
        signature=signature,
        launch=Launch({**fixed, **flags, **launch.constants}, launch.num_warps, launch.num_stages),
        aligned=tuple(name for name in signature if name.endswith("_ptr") or name in ("N", "K")),
        weights_per_thread=block_n * fixed["GROUP"] / (32 * launch.num_warps) if instructions else None,
        instructions=instructions,
    )
