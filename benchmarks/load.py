"""Peak memory while a checkpoint is loaded into NF4: the quantized model plus a few of its largest tensors.

`python -m benchmarks.load` writes a random LLaMA checkpoint (safetensors, bfloat16) and loads it with double
quantization in a process of its own, whose peak resident size is read from the system; `--model PATH`
measures a checkpoint of yours. What is reported as overhead is the peak above (process before loading +
loaded model), in units of the largest tensor in float32.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import models
import nf4
from models.config import LlamaConfig
from models.linear import NF4Linear
from models.writer import CheckpointWriter
from train.memory import peak_memory_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="measure this checkpoint instead of a random one")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the random checkpoint, 67 M weights each")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.model)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or random_checkpoint(Path(folder) / "model", options.layers)
        command = [sys.executable, "-m", "benchmarks.load", "--child", "--model", str(path)]
        result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    result |= {"torch": torch.__version__, "device": f"{platform.machine()} CPU"}
    print(json.dumps(result, indent=1))


def measure(path: Path) -> dict[str, float]:
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


def random_checkpoint(directory: Path, layers: int) -> Path:
    """A LLaMA of random bfloat16 weights, written shard by shard."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
    )
    with torch.device("meta"):
        model = models.Llama(config)
    with CheckpointWriter(directory, shard_bytes=2**29) as writer:
        for name, parameter in model.named_parameters():
            writer.add(name, torch.randn(parameter.shape).mul_(0.02).to(torch.bfloat16))
        writer.finish(config.to_dict(), "bfloat16", None)
    return directory


if __name__ == "__main__":
    main()
