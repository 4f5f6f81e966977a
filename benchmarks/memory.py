"""Where the memory of a fine-tuning is, part by part, under each optimizer.

SmolLM2-135M's sizes with random weights in NF4 and rank-16 adapters (`benchmarks.training`), a process for each
optimizer: the bytes of the tensors of each part after two steps, with states in managed memory as a part of their own,
and the peak of the steps above what the process had before the model was built. On a CUDA device the peak is of torch's
own tensors, among which managed memory is not; on a CPU it is the resident size, and there is no managed memory.
"""

import dataclasses
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from benchmarks import training
from benchmarks.training import Setting, Stepper
from models.config import LlamaConfig
from train.footprint import footprint
from train.memory import peak_memory_bytes
from train.optimizer import Name

NAMES: tuple[Name, ...] = get_args(Name)
PARTS = {  # of a row, and what a person calls them
    "quantized_bytes": "base, NF4 with its scales",
    "rest_bytes": "base, 16 bits",
    "adapters_bytes": "adapters",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "states of the optimizer",
    "managed_bytes": "states in managed memory",
    "peak_above_start_bytes": "peak of two steps",
}


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Give a row per optimizer."""
    settings = [dataclasses.replace(setting, optimizer=name) for name in NAMES]
    return training.apart(setting.device, measured_apart, settings)


def measured_apart(setting: Setting) -> dict[str, Any]:
    """The row of `setting.optimizer`, by a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(setting))]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {setting.optimizer} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def measured(setting: Setting) -> dict[str, Any]:
    """The same, in this process, which must have done nothing else."""
    small = dataclasses.replace(setting, config=training.TINY, batch=2, tokens=16)
    Stepper(training.ours(small), small)()  # what torch loads only when it is used
    before = peak_memory_bytes(setting.device)
    step = Stepper(training.ours(setting), setting)
    for _ in range(2):  # the second has states beside its activations
        step()
    peak = peak_memory_bytes(setting.device)
    optimizer = step.optimizer
    parts = footprint(step.model, optimizer.state_bytes, optimizer.managed_bytes)
    return {
        "optimizer": setting.optimizer,
        "states_in": optimizer.memory_kind,
        **{f"{name}_bytes": size for name, size in asdict(parts).items() if name != "bits_per_weight"},
        "peak_above_start_bytes": peak - before,
    }


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    print(json.dumps(measured(Setting(config=LlamaConfig(**values.pop("config")), **values))))
