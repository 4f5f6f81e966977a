"""Every operator on a stored weight beside its rivals: bitsandbytes, where it is installed, and the dense weight.

A case names an operation and gives each contestant's way of doing it, on the same numbers; contestants take turns.
bitsandbytes multiplies a stored weight in two ways on a CPU: `matmul_4bit` on the layout it trains with and saves,
and, in a layer in evaluation mode, a product on a copy repacked for AVX-512 with scales rounded to bfloat16
("bitsandbytes_repacked"). Both are shown. On a GPU there is one, and weights rotate so that no cache answers.
Beside each time stands its share of the roofline: what the machine, measured in the same run, would take at least for
the bytes and operations that this contestant cannot do without.
M tokens, N outputs, K inputs.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
import nf4
from benchmarks import targets
from benchmarks.roofline import Limits, Work, all_placed
from benchmarks.timing import GraphClock, Rotation, interleaved, stopwatch

Call = Callable[[], object]
RANK, SCALING = 16, 1.0
CPU_TOKENS, CPU_LORA_TOKENS = (1, 16, 512), 1024
GPU_TOKENS, GPU_LORA_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 4096), 4096
SIZES = {"cpu": ((4096, 4096),), "cuda": ((4096, 4096), (11008, 4096))}  # (N, K)


@dataclass(frozen=True)
class Case:
    """One operation, and how each contestant does it on copy number i of the weight."""

    name: str
    contestants: Mapping[str, Callable[[int], object]]
    works: Mapping[str, Work] = field(default_factory=dict)
    """What each of them cannot but do."""
    quick: bool = False
    """Over so soon on a GPU that it is timed as a graph."""
    slow: bool = False
    """So slow that one copy is enough: no cache matters."""


def measure(
    device: str,
    sizes: Iterable[tuple[int, int]] | None = None,
    repeats: int = 7,
    tokens: Iterable[int] | None = None,
    lora_tokens: int | None = None,
    limits: Limits | None = None,
) -> list[dict[str, Any]]:
    """A row for every case and size (N, K): milliseconds, ratios, what the targets say, and places under the roof."""
    gpu = torch.device(device).type == "cuda"
    tokens = tuple(tokens or (GPU_TOKENS if gpu else CPU_TOKENS))
    lora_tokens = lora_tokens or (GPU_LORA_TOKENS if gpu else CPU_LORA_TOKENS)
    rows = []
    for N, K in sizes or SIZES[torch.device(device).type]:
        held = targets.GPU if gpu else targets.CPU if (N, K) == (4096, 4096) else {}
        operands = Operands(N, K, device)
        for case in cases(operands, tokens, lora_tokens):
            row = timed(case, 1 if case.slow else operands.copies, repeats, gpu, limits)
            row |= {"shape": [N, K], "dtype": "bfloat16", "repeats": repeats}
            if limits is not None and "ours" in row["roofline"]:
                row["bandwidth_share"] = row["roofline"]["ours"]["bytes_s"] / limits.bandwidth
            rows.append(targets.judged(row, held.get(case.name.removesuffix(", dropout 0.1"), {})))
    return rows


def timed(case: Case, copies: int, repeats: int, gpu: bool, limits: Limits | None = None) -> dict[str, Any]:
    """The medians of a case's contestants, and ours over the others'; who fails is told of and does not take part."""
    rotations = {name: Rotation([partial(call, i) for i in range(copies)]) for name, call in case.contestants.items()}
    clock = GraphClock(record=case.quick, replays=10 if case.quick else 3) if gpu else stopwatch
    broken = {name: why for name, rotation in rotations.items() if (why := failure(rotation, clock))}
    timings = interleaved({name: each for name, each in rotations.items() if name not in broken}, repeats, clock)
    medians = {name: timing.median for name, timing in timings.items()}
    return {
        "case": case.name,
        "broken": broken,
        **({"seconds": medians["ours"]} if "ours" in medians else {}),
        **{f"{name}_ms": 1000 * median for name, median in medians.items()},
        "fastest_ms": {name: 1000 * timing.fastest for name, timing in timings.items()},
        "slowest_ms": {name: 1000 * timing.slowest for name, timing in timings.items()},
        **(targets.against(medians) if "ours" in medians else {}),
        "roofline": all_placed(case.works, medians, limits),
    }


def failure(rotation: Rotation, clock: Callable[[Call], float]) -> str | None:
    """Why a contestant cannot be timed, in one line: a peer that lacks a kernel for this GPU costs no other's row."""
    try:
        clock(rotation)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def failures(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Who could not be timed, and why."""
    return [f"{row['case']} {row['shape']}: {who}: {why}" for row in rows for who, why in row["broken"].items()]


class Operands:
    """One weight, dense and stored, as many times as it takes to outgrow the cache of a GPU twice; once on a CPU."""

    def __init__(self, N: int, K: int, device: str) -> None:
        self.N, self.K, self.device = N, K, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.dense = [(self.random(N, K) * 0.02).bfloat16()]
        self.stored = [kernels.quantize(self.dense[0])]
        self.copies = 1
        if self.device.type == "cuda":
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self.copies = 1 + 2 * cache // self.stored[0].nbytes
            for _ in range(self.copies - 1):
                self.dense.append((self.random(N, K) * 0.02).bfloat16())
                self.stored.append(kernels.quantize(self.dense[-1]))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def tokens(self, M: int, features: int) -> Tensor:
        return self.random(M, features).bfloat16()


def cases(operands: Operands, tokens: Iterable[int], lora_tokens: int) -> Iterator[Case]:
    """The cases one after the other; what one needs is made when it comes and gone when the next does."""
    o, peer = operands, Peer(operands) if importlib.util.find_spec("bitsandbytes") else None
    weights, dense_bytes, stored_bytes = o.N * o.K, o.dense[0].nbytes, o.stored[0].nbytes
    repacked_bytes = weights // 2 + 2 * weights // 64  # codes and a bfloat16 scale for each block
    held = {"dense": dense_bytes, "bitsandbytes_repacked": repacked_bytes}

    both = Work(weights, stored_bytes + dense_bytes)  # one product with a scale for each weight
    ours: dict[str, Callable[[int], object]] = {"ours": lambda i: kernels.quantize(o.dense[i])}
    contestants = ours | ({"bitsandbytes": peer.quantize} if peer else {})
    yield Case("quantize", contestants, dict.fromkeys(contestants, both))

    ours = {"ours": lambda i: kernels.dequantize(o.stored[i])}
    contestants = ours | ({"bitsandbytes": peer.dequantize} if peer else {})
    yield Case("dequantize", contestants, dict.fromkeys(contestants, both), quick=True)

    for M in tokens:
        x = o.tokens(M, o.K)
        contestants = {"ours": partial(linear, o, x), **(peer.products(x) if peer else {}), "dense": dense(o, x)}
        around = 2 * M * (o.N + o.K)  # x and the result, in bfloat16
        works = {name: Work(2 * M * weights, held.get(name, stored_bytes) + around) for name in contestants}
        yield Case(f"matmul M={M}", {n: without_gradient(c) for n, c in contestants.items()}, works, quick=True)

    for dropout, suffix in ((0.0, ""), (0.1, ", dropout 0.1")):
        lora = Lora(o, lora_tokens, dropout)
        contestants = {"ours": lora.ours, **({"bitsandbytes": lora.peer(peer)} if peer else {}), "dense": lora.dense}
        works = {name: lora.work(held.get(name, stored_bytes)) for name in contestants}
        yield Case(f"LoRA forward and backward M={lora_tokens}{suffix}", contestants, works)

    searched = nf4.QuantConfig(scale="search")
    search: dict[str, Callable[[int], object]] = {"ours": lambda i: kernels.quantize(o.dense[i], searched)}
    yield Case("quantize by search", search, {"ours": Work(0, both.nbytes)}, slow=True)


def linear(o: Operands, x: Tensor, i: int) -> Tensor:
    return kernels.nf4_linear(x, o.stored[i])


def dense(o: Operands, x: Tensor) -> Callable[[int], Tensor]:
    return lambda i: F.linear(x, o.dense[i])


def without_gradient(call: Callable[[int], object]) -> Callable[[int], object]:
    return torch.no_grad()(call)


class Lora:
    """One adapted layer forward and backward: gradients of x, A and B."""

    def __init__(self, o: Operands, M: int, dropout: float) -> None:
        self.o, self.dropout = o, dropout
        self.x = o.tokens(M, o.K).requires_grad_()
        self.dy = o.tokens(M, o.N)
        self.a, self.b = ((o.random(*shape) * 0.02).requires_grad_() for shape in ((RANK, o.K), (o.N, RANK)))

    def work(self, weight_bytes: int) -> Work:
        """Of forward and backward: two products with W, three with each of A and B, and what goes in and comes out."""
        M, N, K = self.x.shape[0], self.o.N, self.o.K
        adapter = 2 * (self.a.nbytes + self.b.nbytes)  # read, and their gradients written
        return Work(4 * M * N * K + 6 * M * RANK * (N + K), 2 * weight_bytes + 4 * M * (N + K) + adapter)

    def ours(self, i: int) -> object:
        y = kernels.nf4_lora_linear(self.x, self.o.stored[i], self.a, self.b, SCALING, dropout=self.dropout)
        return torch.autograd.grad(y, (self.x, self.a, self.b), self.dy)

    def dense(self, i: int) -> object:
        inner = F.linear(F.dropout(self.x, self.dropout), self.a.to(self.x.dtype))
        y = F.linear(self.x, self.o.dense[i]) + F.linear(inner, self.b.to(self.x.dtype)) * SCALING
        return torch.autograd.grad(y, (self.x, self.a, self.b), self.dy)

    def peer(self, peer: "Peer") -> Callable[[int], object]:
        layers = peer.adapted(self)

        def call(i: int) -> object:
            layer = layers[i]
            return torch.autograd.grad(layer(self.x), (self.x, layer.lora_A.weight, layer.lora_B.weight), self.dy)

        return call


class Peer:
    """bitsandbytes on the same weights."""

    def __init__(self, o: Operands) -> None:
        from benchmarks.peer import LoraLinear, bitsandbytes

        self.o, self.bitsandbytes, self.layer = o, bitsandbytes, LoraLinear
        self.stored = [self.quantize(i) for i in range(o.copies)]

    def quantize(self, i: int) -> Any:
        return self.bitsandbytes.functional.quantize_4bit(
            self.o.dense[i], blocksize=64, compress_statistics=True, quant_type="nf4"
        )

    def dequantize(self, i: int) -> Tensor:
        packed, state = self.stored[i]
        return self.bitsandbytes.functional.dequantize_4bit(packed, state)

    def products(self, x: Tensor) -> dict[str, Callable[[int], object]]:
        """The ways in which it multiplies without a gradient."""

        def stored(i: int) -> Tensor:
            packed, state = self.stored[i]
            return self.bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)

        if self.o.device.type != "cpu":
            return {"bitsandbytes": stored}
        layer = self.bitsandbytes.nn.Linear4bit(
            self.o.K, self.o.N, bias=False, compute_dtype=x.dtype, quant_type="nf4", device="meta"
        )
        weight = self.bitsandbytes.nn.Params4bit(self.o.dense[0], quant_type="nf4", module=layer)
        layer.weight = weight.to(self.o.device)
        layer.eval()
        if not layer.support_avx512bf16_for_cpu:
            return {"bitsandbytes": stored}
        return {"bitsandbytes": stored, "bitsandbytes_repacked": lambda i: layer(x)}

    def adapted(self, lora: Lora) -> list[Any]:
        """Its layers with a LoRA branch in plain torch, and the adapter of the others."""
        layers = [self.layer(weight, RANK, SCALING, lora.dropout) for weight in self.o.dense]
        for layer in layers:
            layer.lora_A.weight.data, layer.lora_B.weight.data = lora.a.data, lora.b.data
        return layers
