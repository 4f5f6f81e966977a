"""Loading a checkpoint into NF4: how long it takes, and how much memory beside the model.

Time: everyone reads the same files with the same reader, in turns in one process. Ours is `models.load` with double
quantization; bitsandbytes gets each tensor as it is read and quantizes those that we do; "16 bits" loads without
quantizing; and reading alone, in whatever format, is the limit for all three (files that were just written or read are
in the system's cache, so that no disk is measured). Beside it stands quantizing alone, on weights in memory, in
weights a second and under the roof of a plain copy.

Memory: the peak resident size of a process that does nothing but load, above what it had before and the loaded model,
in units of the largest tensor in float32.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kernels
import models
import nf4
from benchmarks.roofline import Limits, Work, all_placed
from benchmarks.targets import against
from benchmarks.timing import interleaved, stopwatch
from benchmarks.training import finished
from models.checkpoint import linear_weights, open_checkpoint, skeleton
from models.config import LlamaConfig
from models.linear import NF4Linear
from models.readers import Reader
from models.writer import CheckpointWriter
from train.memory import peak_memory_bytes

RANDOM = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
)
"""668 M weights, 67 M in each block."""
AT_ONCE = 2**26


def measure(
    device: str, model: Path | None, repeats: int, limits: Limits | None = None, config: LlamaConfig = RANDOM
) -> dict[str, Any]:
    """Rows of times, and what memory loading takes: of a checkpoint, or without one of random weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = model or random_checkpoint(Path(folder) / "model", config)
        rows = [loading(path, device, repeats), quantizing(path, device, repeats, limits)]
        return {"rows": rows, "memory": peak_apart(path)}


@dataclass(frozen=True)
class Source:
    """A checkpoint: what reads it, how many weights its model has, and which tensors loading quantizes."""

    reader: Reader
    weights: int
    linears: tuple[str, ...]

    @classmethod
    def of(cls, path: Path) -> "Source":
        raw, reader, where = open_checkpoint(path)
        model = skeleton(raw, where, reader)
        linears = tuple(name for name, layer in linear_weights(model).items() if not layer.in_head)
        return cls(reader, sum(p.numel() for p in model.parameters()), linears)


def loading(path: Path, device: str, repeats: int) -> dict[str, Any]:
    """Seconds from files to a model, in turns."""
    source = Source.of(path)
    contestants: dict[str, Callable[[], object]] = {
        "ours": lambda: models.load(path, nf4.QuantConfig(), dtype=torch.bfloat16, device=device),
        "16_bits": lambda: models.load(path, dtype=torch.bfloat16, device=device),
        "reading": lambda: [source.reader.read(name).sum() for name in source.reader.shapes],
    }
    if quantize := peer():
        contestants["bitsandbytes"] = partial(quantized_by, quantize, source, device)
    times = interleaved(contestants, repeats, lambda work: stopwatch(finished(work, device)))
    seconds = {name: timing.median for name, timing in times.items()}
    return {"case": "load", **told(source.weights, seconds)}


def quantized_by(quantize: Callable[[Tensor], object], source: Source, device: str) -> list[object]:
    """Every tensor of a checkpoint in bfloat16, the linear layers quantized."""
    made: list[object] = []
    for name in source.reader.shapes:
        weight = source.reader.read(name).to(device, torch.bfloat16)
        made.append(quantize(weight) if name in source.linears else weight)
    return made


def quantizing(path: Path, device: str, repeats: int, limits: Limits | None) -> dict[str, Any]:
    """Seconds to quantize linear layers that are in memory: the first that have `AT_ONCE` weights together."""
    source = Source.of(path)
    dense: list[Tensor] = []
    for name in source.linears:
        if sum(weight.numel() for weight in dense) < AT_ONCE:
            dense.append(source.reader.read(name).to(device, torch.bfloat16))
    contestants: dict[str, Callable[[], object]] = {"ours": lambda: [kernels.quantize(weight) for weight in dense]}
    if quantize := peer():
        contestants["bitsandbytes"] = lambda: [quantize(weight) for weight in dense]
    times = interleaved(contestants, repeats, lambda work: stopwatch(finished(work, device)))
    seconds = {name: timing.median for name, timing in times.items()}
    weights = sum(weight.numel() for weight in dense)
    work = Work(weights, sum(weight.nbytes + kernels.quantize(weight).nbytes for weight in dense))
    placed = all_placed(dict.fromkeys(seconds, work), seconds, limits)
    return {"case": "quantize", **told(weights, seconds), "roofline": placed}


def told(weights: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Times, weights a second, and ratios."""
    times = {f"{name}_seconds": took for name, took in seconds.items()}
    speeds = {f"{name}_weights_s": weights / took for name, took in seconds.items()}
    return {"weights": weights, **times, **speeds, **against(seconds)}


def peer() -> Callable[[Tensor], object] | None:
    """bitsandbytes' way to quantize, where it is installed."""
    if not importlib.util.find_spec("bitsandbytes"):
        return None
    from benchmarks.peer import bitsandbytes

    return lambda weight: bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )


def peak_apart(path: Path) -> dict[str, float]:
    """What `peak_here` says in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.load", str(path.resolve())]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {path.name} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def peak_here(path: Path) -> dict[str, float]:
    """Load in this process, and compare its peak with what it had before and what the model takes."""
    before = peak_memory_bytes()
    model = models.load(path, nf4.QuantConfig(), dtype=torch.bfloat16)
    after = peak_memory_bytes()
    tensors = [*model.parameters(), *model.buffers()]
    stored = sum(t.nbytes for t in tensors)
    sizes = [m.quantized.numel for m in model.modules() if isinstance(m, NF4Linear)]
    largest = 4 * max([*sizes, model.config.vocab_size * model.config.hidden_size])
    overhead = after - before - stored
    return {
        "parameters": parameter_count(model),
        "model_mib": round(stored / 2**20, 1),
        "largest_tensor_float32_mib": round(largest / 2**20, 1),
        "process_before_mib": round(before / 2**20, 1),
        "peak_mib": round(after / 2**20, 1),
        "overhead_mib": round(overhead / 2**20, 1),
        "overhead_in_largest_tensors": round(overhead / largest, 2),
    }


def parameter_count(model: nn.Module) -> int:
    """Weights that the model has, a quantized one counted as often as it stands for a number."""
    stored = {id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear)}
    codes = {id(m.absmax_codes) for m in model.modules() if isinstance(m, NF4Linear)}
    return sum(stored.get(id(p), p.numel()) for p in model.parameters() if id(p) not in codes)


def random_checkpoint(directory: Path, config: LlamaConfig) -> Path:
    """A LLaMA of random bfloat16 weights, written shard by shard."""
    with torch.device("meta"):
        model = models.Llama(config)
    with CheckpointWriter(directory, shard_bytes=2**29) as writer:
        for name, parameter in model.named_parameters():
            writer.add(name, torch.randn(parameter.shape).mul_(0.02).to(torch.bfloat16))
        writer.finish(config.to_dict(), "bfloat16", None)
    return directory


if __name__ == "__main__":  # the process that `peak_apart` starts
    print(json.dumps(peak_here(Path(sys.argv[1]))))
