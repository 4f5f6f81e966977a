"""How fast data files are read and put into batches, and what packing saves: the figures of `train/data`.

`python -m benchmarks.data [--out FILE]` writes files of made-up instructions and opens them (every record is decoded,
checked and indexed), with the memory that this takes; makes the order of an epoch of half a million lengths in each
mode; and trains a small LLaMA in float32 on the same texts padded, grouped by length and packed, in turns.
"""

import argparse
import csv
import json
import random
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
from benchmarks.tables import finish
from benchmarks.timing import interleaved, stopwatch
from models import LoraConfig, attach_lora
from models.config import LlamaConfig
from train.data.batches import Batches
from train.data.examples import open_examples
from train.data.order import Rules, batch_sizes, order
from train.data.tokenized import IGNORED, Tokenized
from train.optimizer import OptimizerConfig, make_optimizer
from train.passes import Passes
from train.step import update

SMALL = LlamaConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=10000.0,
    tie_word_embeddings=True,
)  # fmt: skip
ORDERS = {
    "8 rows as they come": Rules(batch_size=8, seed=1),
    "8 rows of like length": Rules(batch_size=8, group_by_length=True, seed=1),
    "8192 tokens, of like length": Rules(batch_tokens=8192, group_by_length=True, seed=1),
    "8 rows packed to 1024": Rules(batch_size=8, row_tokens=1024, seed=1),
}


def measure(records: int, lengths: int, texts: int, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """The three tables."""
    return {"files": files(records, repeats), "orders": orders(lengths, repeats), "steps": steps(texts, repeats)}


def files(count: int, repeats: int) -> list[dict[str, Any]]:
    """How many megabytes a second are opened in each kind of file, and the memory above what was there before."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: written(Path(folder), kind, count) for kind in ("jsonl", "json", "csv")}
        opened: dict[str, Callable[[], object]] = {
            kind: lambda path=path: open_examples(path) for kind, path in paths.items()
        }
        times = interleaved(opened, repeats)
        return [
            {
                "file": kind,
                "bytes": path.stat().st_size,
                "records": count,
                "megabytes_per_second": path.stat().st_size / times[kind].median / 1e6,
                "peak_memory": memory_of(opened[kind]),
            }
            for kind, path in paths.items()
        ]


def written(folder: Path, kind: str, count: int) -> Path:
    """A file of instructions of some 900 bytes each."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(2000)]
    path = folder / f"data.{kind}"

    def record() -> dict[str, str]:
        return {
            "instruction": " ".join(draw.choices(words, k=30)),
            "input": "",
            "output": " ".join(draw.choices(words, k=100)),
        }

    with path.open("w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            rows = csv.DictWriter(file, ["instruction", "input", "output"])
            rows.writeheader()
            rows.writerows(record() for _ in range(count))
        elif kind == "json":
            file.write("[\n" + ",\n".join(json.dumps(record(), indent=1) for _ in range(count)) + "\n]\n")
        else:
            file.writelines(json.dumps(record()) + "\n" for _ in range(count))
    return path


def memory_of(work: Callable[[], object]) -> int:
    """The most that Python and numpy held at once beyond what they held before, in bytes."""
    tracemalloc.start()
    try:
        kept = work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        del kept


def some_lengths(count: int, median: float, longest: int) -> np.ndarray:
    """Log-normal, as the lengths of conversations are."""
    drawn = np.random.default_rng(0).lognormal(np.log(median), 0.8, count)
    return drawn.clip(8, longest).astype(np.int64)


def orders(count: int, repeats: int) -> list[dict[str, Any]]:
    """How long an epoch's order takes to make, and which share of its tokens is padding."""
    lengths = some_lengths(count, 150, 1024)
    sizes = np.stack([lengths, np.zeros_like(lengths)], axis=1)
    times = interleaved({name: lambda rules=rules: order(sizes, rules, 0) for name, rules in ORDERS.items()}, repeats)
    return [
        {
            "order": name,
            "examples": count,
            "mean_length": float(lengths.mean()),
            "seconds": times[name].median,
            "padding": 1 - float(lengths.sum() / batch_sizes(sizes, order(sizes, rules, 0))[:, 1].sum()),
        }
        for name, rules in ORDERS.items()
    ]


def steps(count: int, repeats: int) -> list[dict[str, Any]]:
    """Tokens a second, padding not counted, of an epoch over the same texts in batches of different kinds."""
    texts = made_up(some_lengths(count, 80, 512))
    tokens = sum(len(text.input_ids) for text in texts)
    batches = {
        "padded, 8 rows": Batches(texts, 8, 0, seed=1),
        "of like length, 8 rows": Batches(texts, 8, 0, seed=1, group_by_length=True),
        "packed, 2 rows of 512": Batches(texts, 2, 0, seed=1, row_tokens=512),
    }
    model = small_model()
    times = interleaved({name: lambda it=it: an_epoch(model, it) for name, it in batches.items()}, repeats, stopwatch)
    return [{"batches": name, "texts": count, "tokens_per_second": tokens / times[name].median} for name in batches]


def made_up(lengths: np.ndarray) -> list[Tokenized]:
    draw = np.random.default_rng(1)
    ids = [draw.integers(1, SMALL.vocab_size, length).tolist() for length in lengths.tolist()]
    return [Tokenized(row, [IGNORED, *row[1:]], f"text {number}") for number, row in enumerate(ids)]


def small_model() -> models.Llama:
    torch.manual_seed(0)
    model = models.Llama(SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    attach_lora(model, LoraConfig(rank=8))
    return model.train()


def an_epoch(model: models.Llama, batches: Batches) -> None:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with make_optimizer(parameters, OptimizerConfig()) as optimizer:
        for number, batch in enumerate(batches.epoch(0), 2):  # step 1 is checked in ways that cost time
            update(Passes(model), optimizer, [batch], number, 0.3)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=400_000)
    parser.add_argument("--lengths", type=int, default=500_000)
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the result; benchmarks/results/data-cpu.json is kept")
    options = parser.parse_args(argv)
    tables = measure(options.records, options.lengths, options.texts, options.repeats)
    finish("data", tables, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
