"""Before any speed: is every operator right on this device? Each against float64, and against plain torch.

Where the definition fixes bits (codes, scales, decoded weights) not one may differ. All else may err at most twice as
much as the definition does in the same dtype on the same device, both against float64, and at its worst entry, where
either may be lucky, three times as much.
M tokens, N outputs, K inputs, R rank.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import kernels
import nf4
from kernels import dispatch, reference
from kernels import updates as definitions
from kernels.updates import STATE_BLOCK, AdamWNumbers, LionNumbers
from nf4 import QuantizedTensor

SMALL = ((1, 192, 256), (3, 576, 1536), (48, 320, 576))  # (M, N, K)
LARGE = ((8, 11008, 4096), (16, 4096, 4096), (64, 4096, 4096), (300, 1536, 576), (1024, 4096, 11008))
RANK, SCALING, DROPOUT, SEED = 16, 0.5, 0.1, 1234567890123
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01


def check(device: str, shapes: Iterable[tuple[int, int, int]] | None = None) -> list[dict[str, Any]]:
    """A row for every operator, shape (M, N, K), dtype and format: the errors, and whether it is right."""
    rows = []
    for M, N, K in shapes_for(device) if shapes is None else shapes:
        for dtype in (torch.bfloat16, torch.float16):
            about = {"dtype": str(dtype).removeprefix("torch."), "shape": [M, N, K]}
            rows += [row | about for row in layers(M, N, K, dtype, device)]
            rows += [row | about for row in updates(N, K, dtype, device)]
            for config in (nf4.QuantConfig(), nf4.QuantConfig("int4", 128, double_quant=False)):
                stored = about | {"codebook": config.codebook, "block_size": config.block_size}
                rows += [row | stored for row in products(M, N, K, dtype, config, device)]
    return rows


def shapes_for(device: str) -> tuple[tuple[int, int, int], ...]:
    """Shapes as (M, N, K); on a CPU only those that take no minutes in float64."""
    return SMALL if torch.device(device).type == "cpu" else SMALL + LARGE


def failures(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What is not right, in words."""
    told = []
    for row in rows:
        if not row["right"]:
            what = "differs"
            if "error" in row:
                what = f"errs by {row['error']:.3g}, allowed {row['allowed']:.3g}; "
                what += f"at worst by {row['worst']:.3g}, allowed {row['worst_allowed']:.3g}"
            told.append(f"{row['operator']} {row['shape']} {row['dtype']} {row.get('codebook', '')} {what}")
    return told


def products(
    M: int, N: int, K: int, dtype: torch.dtype, config: nf4.QuantConfig, device: str
) -> Iterator[dict[str, Any]]:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weight = (random(N, K) * 0.02).to(dtype)
    q, expected = kernels.quantize(weight, config), reference.quantize(weight, config)
    yield exact("quantize", tensors(q), tensors(expected))
    for out in (dtype, torch.float32):
        yield exact(f"dequantize to {out}", [kernels.dequantize(q, out)], [reference.dequantize(q, out)])

    W = reference.dequantize(q, torch.float32).double()
    x, dy, bias = random(M, K).to(dtype), random(M, N).to(dtype), random(N).to(dtype)
    a, b = random(RANK, K) * K**-0.5, random(N, RANK)
    keep = reference.drop(torch.ones(M, K, device=device), DROPOUT, SEED).double()

    def outcome(form: Any, with_lora: bool) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in ((x, a, b) if with_lora else (x,))]
        if with_lora:
            y = form.nf4_lora_linear(leaves[0], q, leaves[1], leaves[2], SCALING, bias, DROPOUT, SEED)
        else:
            y = form.nf4_linear(leaves[0], q, bias)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    X, DY, A, B = (t.double() for t in (x, dy, a.to(dtype), b.to(dtype)))
    plain = [X @ W.T + bias.double(), DY @ W]
    for name, *three in zip(("y", "dx"), outcome(kernels, False), outcome(reference, False), plain, strict=True):
        yield close(f"nf4_linear {name}", *three)

    inner = (X * keep) @ A.T
    dinner = SCALING * DY @ B
    lora = [
        plain[0] + SCALING * inner @ B.T, plain[1] + keep * (dinner @ A),
        dinner.T @ (X * keep), SCALING * DY.T @ inner,
    ]  # fmt: skip
    named = ("y", "dx", "da", "db")
    for name, *three in zip(named, outcome(kernels, True), outcome(reference, True), lora, strict=True):
        yield close(f"nf4_lora_linear {name}", *three)


def layers(M: int, N: int, K: int, dtype: torch.dtype, device: str) -> Iterator[dict[str, Any]]:
    """The layers around the products, and the loss: M tokens of width K, a vocabulary of N."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    angles = torch.arange(M, device=device)[:, None] * 10000.0 ** (-torch.arange(32, device=device) / 32)
    cos, sin = angles.cos()[None, None], angles.sin()[None, None]  # (1, 1, M, 32)
    labels = torch.randint(N, (M,), generator=generator, device=device)
    cases: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "rms_norm": (lambda form, x, weight: form.rms_norm(x, weight, 1e-5), (random(M, K), random(K))),
        "rotate": (lambda form, x: form.rotate(x, cos, sin), (random(1, 3, M, 64),)),
        "swiglu": (lambda form, gate, up: form.swiglu(gate, up), (random(M, K), random(M, K))),
        "linear_cross_entropy": (
            lambda form, hidden, weight: form.linear_cross_entropy(hidden, weight, labels),
            (random(M, K), random(N, K) * K**-0.5),
        ),
    }
    for name, (call, given) in cases.items():
        dy: Tensor | None = None
        outcomes = []
        for form, to in ((kernels, dtype), (reference, dtype), (reference, torch.float64)):
            leaves = [tensor.detach().to(to).requires_grad_() for tensor in given]
            y = call(form, *leaves)
            dy = random(*y.shape) if dy is None else dy
            outcomes.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
        for i, three in enumerate(zip(*outcomes, strict=True)):
            yield close(f"{name} {'y' if i == 0 else f'gradient {i}'}", *three)


def updates(N: int, K: int, dtype: torch.dtype, device: str) -> Iterator[dict[str, Any]]:
    """What three steps of each optimizer make of a LoRA pair and two vectors: bit for bit the definition's on a CPU.

    AdamW in float32 is held to float64 too, beside torch's own.
    """
    generator = torch.Generator(device).manual_seed(0)
    sizes = (RANK * K, N * RANK, N, K + 1)

    def random() -> list[Tensor]:
        return [torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes]

    start, steps = random(), [random() for _ in range(3)]
    for operator in ("adamw", "adamw_8bit", "lion"):
        ours = stepped(operator, start, steps)
        defined = stepped(operator, [p.cpu() for p in start], [[g.cpu() for g in grads] for grads in steps], True)
        yield exact(operator, [tensor.cpu() for tensor in ours], defined)

    ours = stepped("adamw", [p.float() for p in start], steps)[: len(sizes)]
    torchs = []
    for to in (torch.float32, torch.float64):
        params = [p.to(to, copy=True).requires_grad_() for p in start]
        optimizer = torch.optim.AdamW(params, LR, BETAS, EPS, DECAY)
        for grads in steps:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(to)
            optimizer.step()
        torchs.append(torch.cat(params).detach())
    yield close("adamw in float32", torch.cat(ours), *torchs)


def stepped(operator: str, start: list[Tensor], steps: list[list[Tensor]], by_definition: bool = False) -> list[Tensor]:
    """Parameters and states after some steps, by the form that is for their device, or by the definition."""
    params = [p.clone() for p in start]
    states = zero_states(operator, params)
    for step, grads in enumerate(steps, start=1):
        n = AdamWNumbers.of(step, LR, BETAS, EPS, DECAY)
        numbers = [LionNumbers(*BETAS, LR, n.decay) if operator == "lion" else n] * len(params)
        form = dispatch.form(operator, params[0].device, params, grads)
        form = getattr(definitions, operator) if by_definition else form
        form(params, grads, *states, numbers)
    return [tensor for tensors in (params, *states) for tensor in tensors]


def zero_states(operator: str, params: list[Tensor]) -> list[list[Tensor]]:
    """An operator's states before the first step."""
    zeros = [torch.zeros(p.shape, device=p.device) for p in params]
    if operator != "adamw_8bit":
        return [[z.clone() for z in zeros] for _ in range(2 if operator == "adamw" else 1)]
    pairs = [[nf4.quantize_dynamic(z, STATE_BLOCK, signed) for z in zeros] for signed in (True, False)]
    return [[pair[i] for pair in kind] for kind in pairs for i in (0, 1)]


def exact(name: str, ours: list[Tensor], expected: list[Tensor]) -> dict[str, Any]:
    different = sum(int((a != b).sum()) for a, b in zip(ours, expected, strict=True))
    return {"operator": name, "different": different, "right": different == 0}


def close(name: str, ours: Tensor, torchs: Tensor, expected: Tensor) -> dict[str, Any]:
    """Errors in units of the expected values' norm, and of the largest of them."""
    off, torchs_off = ours.double() - expected, torchs.double() - expected
    norm, largest = expected.norm(), expected.abs().max()
    row = {
        "error": float(off.norm() / norm),
        "allowed": 2 * float(torchs_off.norm() / norm),
        "worst": float(off.abs().max() / largest),
        "worst_allowed": 3 * float(torchs_off.abs().max() / largest),
    }
    return {"operator": name, **row, "right": row["error"] <= row["allowed"] and row["worst"] <= row["worst_allowed"]}


def tensors(q: QuantizedTensor) -> list[Tensor]:
    """What a stored weight consists of."""
    parts = (q.packed, q.absmax, q.absmax_codes, q.nested_absmax, q.absmax_offset)
    return [part for part in parts if part is not None]
