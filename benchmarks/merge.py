"""Peak memory while an adapter is merged into a 16-bit checkpoint: the 4-bit model, a shard, and one tensor in float32.

`python -m benchmarks.merge --model PATH` loads a checkpoint in NF4, puts rank-16 adapters on it, and writes the merged
model in shards of each size, in a process of its own, whose peak resident size is read from the system. What is
reported is the peak above the process with the model loaded, beside the size of the whole 16-bit model. (Linux: loading
has a peak of its own, which is forgotten before merging begins.)
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import models
import nf4
from models.merging import merge_checkpoint
from train.memory import peak_memory_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint of any layout")
    parser.add_argument("--shards", type=int, nargs="+", default=[16, 64, 4096], help="shard sizes in MiB")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.model, options.shards[0])))
        return
    rows = []
    for mib in options.shards:
        command = [sys.executable, "-m", "benchmarks.merge", "--child", "--model", str(options.model), "--shards"]
        run = subprocess.run([*command, str(mib)], capture_output=True, text=True, check=True)
        rows.append(json.loads(run.stdout))
    print(json.dumps({"rows": rows, "torch": torch.__version__, "device": f"{platform.machine()} CPU"}, indent=1))


def measure(path: Path, shard_mib: int) -> dict[str, float]:
    """Load, attach and merge in this process, and compare its peak with what it had before merging."""
    model = models.load(path, nf4.QuantConfig(), dtype=torch.bfloat16)
    models.attach_lora(model, models.LoraConfig(rank=16))
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
    before = peak_memory_bytes()
    with tempfile.TemporaryDirectory() as folder:
        merge_checkpoint(model, Path(folder) / "merged", shard_bytes=shard_mib * 2**20)
        after = peak_memory_bytes()
        written = [file.stat().st_size for file in (Path(folder) / "merged").glob("*.safetensors")]
    return {
        "shard_mib": shard_mib,
        "files": len(written),
        "written_mib": round(sum(written) / 2**20, 1),
        "largest_file_mib": round(max(written) / 2**20, 1),
        "peak_above_model_mib": round((after - before) / 2**20, 1),
    }


if __name__ == "__main__":
    main()
