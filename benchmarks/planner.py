"""The memory planner held against what a step really takes: predicted and measured bytes of tensors, side by side.

`python -m benchmarks.planner [--device cpu|cuda] [--out FILE]` takes two steps of each configuration with random
weights. On a CPU every allocation of torch is counted, as its profiler records them; on a GPU it is torch's own count
of its memory, in which managed memory is not. A ratio further than 5 % from 1 is a failure.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import provenance
from models import LoraConfig
from train.optimizer import OptimizerConfig
from train.planner.jobs import with_classifier
from train.planner.measure import measured_peak
from train.planner.plan import plan
from train.planner.sizes import SIZES
from train.planner.step import Job

BAR = 0.05
SMOLLM2, ADAPTER = SIZES["smollm2-135m"], LoraConfig(rank=16)

JOBS: Mapping[str, Job] = {
    "T5-small, NF4, checkpointing, 8 x 128 to 64": Job(
        raw=SIZES["t5-small"], lora=ADAPTER, batch_size=8, max_len=128, target_len=64
    ),
    "T5-base v1.1, 16-bit LoRA, all kept, 2 x 128 to 32": Job(
        raw=SIZES["t5-v1.1-base"], quant=None, lora=ADAPTER, gradient_checkpointing=False, batch_size=2, max_len=128,
        target_len=32,
    ),
    "RoBERTa-base, NF4, float32, all kept, 8 x 128": with_classifier(
        Job(
            raw=SIZES["roberta-base"], lora=ADAPTER, gradient_checkpointing=False, batch_size=8, max_len=128,
            dtype=torch.float32,
        )
    ),
    "SmolLM2-135M, 16-bit LoRA, all kept, 1 x 256": Job(
        raw=SMOLLM2, quant=None, lora=ADAPTER, gradient_checkpointing=False, max_len=256
    ),
    "SmolLM2-135M, full fine-tuning, checkpointing, 1 x 128": Job(raw=SMOLLM2, quant=None, lora=None, max_len=128),
    "SmolLM2-135M, NF4, checkpointing, 4 x 256": Job(raw=SMOLLM2, lora=ADAPTER, batch_size=4, max_len=256),
    "SmolLM2-135M, NF4, checkpointing, 4 x 256, 8-bit states": Job(
        raw=SMOLLM2, lora=ADAPTER, batch_size=4, max_len=256, optimizer=OptimizerConfig(name="adamw-8bit")
    ),
}  # fmt: skip


QUICK = {
    "a small LLaMA": Job(
        raw={
            **SMOLLM2, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 300,
        },
        lora=ADAPTER, batch_size=2, max_len=64, dtype=torch.float32,
    )
}  # fmt: skip


def measure(device: str, jobs: Mapping[str, Job] = JOBS) -> list[dict[str, Any]]:
    """A row per configuration: bytes predicted and measured, and their ratio."""
    return list(measured_rows(device, jobs))


def measured_rows(device: str, jobs: Mapping[str, Job]) -> Iterator[dict[str, Any]]:
    for name, job in jobs.items():
        planned = plan(job, torch.device(device).type)
        predicted = planned.needed  # without cuBLAS's workspaces, which an earlier step has made
        measured = measured_peak(job, device)
        row = {"case": name, "predicted_bytes": predicted, "measured_bytes": measured, "ratio": predicted / measured}
        yield row | {"moment": planned.moment, "parts": {label: n for label, n in planned.parts.items() if n}}


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What was planned wrongly."""
    return [f"{row['case']}: {row['ratio']:.3f} of what was measured" for row in rows if abs(row["ratio"] - 1) > BAR]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="file for the result; benchmarks/results/planner-cpu.json is kept")
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    about = provenance(options.device)
    for row in measured_rows(options.device, JOBS):
        predicted, measured = row["predicted_bytes"], row["measured_bytes"]
        print(f"{row['ratio']:.4f}  {predicted:>14,}  {measured:>14,}  {row['case']}", flush=True)
        rows.append(row)
        if options.out:  # after each, since the large ones take minutes
            result = {"benchmark": "planner", **about, "rows": rows, "failures": failures(rows)}
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if failures(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
