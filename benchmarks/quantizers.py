"""What a quantizer costs and what it loses: time on a 4096 x 4096 weight, and squared error on Gaussian weights.

`python -m benchmarks.quantizers` prints one JSON object. Times are medians of seven runs; the error of the
scale search is relative to absmax scales in the same format, on 2^20 samples of a fixed seed.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

import nf4

SAMPLES = 2**20


def main() -> None:
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    q = nf4.quantize(weight)
    searched = nf4.QuantConfig(scale="search")
    times = {
        "quantize_float32_ms": milliseconds(lambda: nf4.quantize(weight)),
        "quantize_bfloat16_ms": milliseconds(lambda half=weight.bfloat16(): nf4.quantize(half)),
        "dequantize_float32_ms": milliseconds(lambda: nf4.dequantize(q, torch.float32)),
        "dequantize_bfloat16_ms": milliseconds(lambda: nf4.dequantize(q, torch.bfloat16)),
        "search_float32_ms": milliseconds(lambda: nf4.quantize(weight, searched), runs=3),
    }
    gains = {
        f"search_block_{size}{'_double_quant' if double else ''}_percent": gain(size, double)
        for size in (32, 64, 128, 4096)
        for double in (False, True)
    }
    machine = {
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    print(json.dumps({**times, **gains, "bits_per_weight": q.bits_per_weight, **machine}, indent=1))


def milliseconds(work: Callable[[], object], runs: int = 7) -> float:
    """Median time of one call, after one to warm up."""
    work()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return round(1000 * statistics.median(taken), 1)


def gain(block_size: int, double_quant: bool) -> float:
    """Change of the squared error by the search, in percent of that of absmax scales."""
    weight = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(1))
    errors = [
        nf4.error(weight, nf4.quantize(weight, nf4.QuantConfig("nf4", block_size, double_quant, 256, scale))).mse
        for scale in ("absmax", "search")
    ]
    return round(100 * (errors[1] / errors[0] - 1), 2)


if __name__ == "__main__":
    main()
