"""One step of training SmolLM2-135M with LoRA on NF4, against the same model in plain torch on bitsandbytes.

A third contestant is ours over dense bfloat16 weights, plain LoRA: what 4 bits cost in time and save in memory. All
get the same random weights, adapters and tokens (speed does not depend on the values) and go through the same
`train.step.update`: loss, backward, clipping, AdamW. Tokens per second are medians of steps taken in turns in one
process; the peak of memory is that of a process each, above what it had before the model was built and as a whole.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kernels
import models
import nf4
from benchmarks import targets
from benchmarks.roofline import Limits
from benchmarks.timing import interleaved, stopwatch
from models.config import LlamaConfig
from models.linear import Linear, NF4Linear
from train.data.batches import Batch
from train.memory import peak_memory_bytes
from train.optimizer import Name, OptimizerConfig, make_optimizer
from train.passes import Passes
from train.step import update

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    tie_word_embeddings=True,
)
TINY = dataclasses.replace(
    SMOLLM2, vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one step goes over, and through what."""

    config: LlamaConfig = SMOLLM2
    batch: int = 4
    tokens: int = 256
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.1
    device: str = "cpu"
    optimizer: Name = "adamw"


def measure(
    setting: Setting, dropouts: tuple[float, ...] = (0.0, 0.1), repeats: int = 5, limits: Limits | None = None
) -> list[dict[str, Any]]:
    """Give a row per dropout; without bitsandbytes the peer's columns stay empty."""
    peers = {"peer"} if importlib.util.find_spec("bitsandbytes") else set()
    builders = {name: build for name, build in BUILDERS.items() if name != "peer" or name in peers}
    steps = {name: Stepper(build(setting), setting) for name, build in builders.items()}
    rows = []
    for dropout in dropouts:
        for step in steps.values():
            step.set_dropout(dropout)
        times = interleaved(steps, repeats, lambda work: stopwatch(finished(work, setting.device)))
        tokens = setting.batch * setting.tokens
        row: dict[str, Any] = {"dropout": dropout}
        row |= {f"{name}_tokens_s": tokens / t.median for name, t in times.items()}
        if limits is not None:
            attained = {name: operations(setting, name) / t.median for name, t in times.items()}
            row |= {f"{name}_flop_s": speed for name, speed in attained.items()}
            row |= {f"{name}_of_roof": speed / limits.peak["bfloat16"] for name, speed in attained.items()}
        rows.append(row)
    del steps
    asked = [(row, name) for row in rows for name in builders]
    settings = [dataclasses.replace(setting, dropout=row["dropout"]) for row, _ in asked]
    peaks = apart(setting.device, peak_of, [name for _, name in asked], settings)
    for (row, name), (above, whole) in zip(asked, peaks, strict=True):
        row |= {f"{name}_peak_above_start": above, f"{name}_peak": whole}
    return [judged(row) for row in rows]


def operations(setting: Setting, name: str) -> int:
    """Operations of the products of a step as this contestant goes about it: a step is bound by them, not by memory.

    For a token: 2 for a weight of a block's linear layers forward, 2 when checkpointing runs the block again, 2 for
    the gradient of what went in (the base itself has none); 2 more for the gradient of a number of the adapters; 4 for
    one of the head; and attention, over half the tokens on average, two products forward, two again, four backward.
    Ours leaves out the last product of a block that runs again, since nobody reads it.
    """
    c = setting.config
    D, inner, L, T = c.hidden_size, c.intermediate_size, c.num_hidden_layers, setting.tokens
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    sizes = [(heads, D), (kv, D), (kv, D), (D, heads), (inner, D), (inner, D), (D, inner)]  # (N, K)
    base, adapters = sum(N * K for N, K in sizes), sum(setting.rank * (N + K) for N, K in sizes)
    left_out = 2 * D * inner if name == "ours" else 0
    of_block = 6 * base + 8 * adapters + 8 * heads * T - left_out
    return setting.batch * T * (L * of_block + 4 * c.vocab_size * D)


def apart(device: str, measure: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """What processes of their own measure, side by side where it is memory of a GPU, which each counts for itself."""
    with ThreadPoolExecutor(1 if torch.device(device).type == "cpu" else 5) as pool:
        return list(pool.map(measure, *arguments))


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """Add what the row says about the targets: how many times the speed, and what share of the memory."""
    if "peer_tokens_s" not in row:
        return row | {"targets": {}}
    ratios = {
        "speed_ratio": row["ours_tokens_s"] / row["peer_tokens_s"],
        "peak_above_start_ratio": row["ours_peak_above_start"] / row["peer_peak_above_start"],
        "peak_ratio": row["ours_peak"] / row["peer_peak"],
    }
    return targets.judged(row | ratios, targets.TRAINING)


class Stepper:
    """A model with its optimizer and a batch; calling it makes one step."""

    def __init__(self, model: Any, setting: Setting, passes: type[Passes] = Passes) -> None:
        self.model = model.train()
        self.passes = passes(model)
        fill(self.passes.moved)
        self.optimizer = make_optimizer(self.passes.moved, OptimizerConfig(name=setting.optimizer))
        generator = torch.Generator().manual_seed(2)
        shape = (setting.batch, setting.tokens)
        ids = torch.randint(setting.config.vocab_size, shape, generator=generator).to(setting.device)
        self.batch = Batch({"input_ids": ids, "labels": ids})
        self.number = 0
        self.set_dropout(setting.dropout)

    def set_dropout(self, dropout: float) -> None:
        for module in self.model.modules():
            if hasattr(module, "lora_A"):
                module.dropout = dropout

    def loss(self) -> Tensor:
        return self.model.loss(**self.batch.inputs)

    def __call__(self) -> float:
        self.number += 1
        return update(self.passes, self.optimizer, [self.batch], self.number, 0.3).loss


def ours(setting: Setting) -> models.Llama:
    """Our model on the random weights, quantized, with adapters and gradient checkpointing."""
    return adapted(setting, lambda weight: NF4Linear(kernels.quantize(weight, nf4.QuantConfig())))


def adapted(setting: Setting, layer: Callable[[Tensor], nn.Module]) -> models.Llama:
    """Our model with these linear layers, adapters on them and gradient checkpointing."""
    model = built(setting.config, setting.device, layer)
    models.attach_lora(model, models.LoraConfig(rank=setting.rank, alpha=setting.alpha, dropout=setting.dropout))
    model.gradient_checkpointing = True
    return model


def built(config: LlamaConfig, device: str, layer: Callable[[Tensor], nn.Module]) -> models.Llama:
    """Our model on the random weights, with a linear layer of a block made of each of them by `layer`."""
    with torch.device("meta"):
        model = models.Llama(config)
    for name, weight in random_weights(config, device):
        path = name.removesuffix(".weight")
        if path.endswith("_proj"):
            model.set_submodule(path, layer(weight))
        else:
            model.get_submodule(path).weight = nn.Parameter(weight)
    return model


def peer(setting: Setting) -> Any:
    """The peer on the same weights."""
    from benchmarks.peer import Llama

    model = Llama(setting.config, random_weights(setting.config, setting.device), setting.rank, setting.alpha)
    model.model.gradient_checkpointing = True
    return model


def dense(setting: Setting) -> models.Llama:
    """Ours over the weights as they are: LoRA on a 16-bit base."""
    return adapted(setting, Linear.from_weight)


BUILDERS: dict[str, Callable[[Setting], Any]] = {"ours": ours, "peer": peer, "dense": dense}


def random_weights(config: LlamaConfig, device: str) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model in bfloat16 under its released name, the same ones for the same config."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in models.Llama(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        weight = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator).mul_(0.02)
        yield name, weight.to(device=device, dtype=torch.bfloat16)


@torch.no_grad()
def fill(adapters: dict[str, nn.Parameter]) -> None:
    """Random adapters, B too, so that the whole branch matters; the same ones whatever the order of the names."""
    generator = torch.Generator().manual_seed(1)
    for name in sorted(adapters):
        adapters[name].copy_(torch.randn(adapters[name].shape, generator=generator).mul_(0.02))


def finished(work: Callable[[], object], device: str) -> Callable[[], object]:
    """The work, done only when the device is through with it."""
    if torch.device(device).type != "cuda":
        return work

    def both() -> None:
        work()
        torch.cuda.synchronize()

    return both


def peak_of(name: str, setting: Setting) -> tuple[int, int]:
    """Bytes at the peak of two steps in a process of their own: above its start, and in all."""
    command = [sys.executable, "-m", "benchmarks.training", name, json.dumps(asdict(setting))]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    above, whole = json.loads(done.stdout)
    return above, whole


def peak_here(name: str, setting: Setting) -> tuple[int, int]:
    """The same, in this process, which must have done nothing else.

    A first step on a tiny model brings in what torch and the peer load only when it is used, 150 MiB of it.
    """
    small = dataclasses.replace(setting, config=TINY, batch=2, tokens=16)
    Stepper(BUILDERS[name](small), small)()
    before = peak_memory_bytes(setting.device)
    step = Stepper(BUILDERS[name](setting), setting)
    for _ in range(2):  # the second has the optimizer's state beside its activations
        step()
    whole = peak_memory_bytes(setting.device)
    return whole - before, whole


def profile(setting: Setting, name: str = "ours", rows: int = 15) -> str:
    """Where the time of one warm step goes: the operators that take most."""
    step = Stepper(BUILDERS[name](setting), setting)
    step()
    with torch.profiler.profile() as profiler:
        step()
        finished(lambda: None, setting.device)()
    kind = torch.device(setting.device).type
    return profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=rows, max_name_column_width=50)


def described(setting: Setting) -> dict[str, Any]:
    """What was measured, in words for the result."""
    return {**asdict(setting), "dtype": "bfloat16", "weights": "nf4, double quantization", "checkpointing": True}


def main() -> None:
    """The process that `peak_of` starts."""
    name, told = sys.argv[1:]
    values = json.loads(told)
    setting = Setting(config=LlamaConfig(**values.pop("config")), **values)
    print(json.dumps(peak_here(name, setting)))


if __name__ == "__main__":
    main()
