"""Writing a checkpoint: config.json and safetensors, in shards if it is large, whole or not at all.

Everything is written into a folder beside the destination and moved there at the end, so a killed or failed
write leaves the destination as it was. Tensors are handed over one at a time; a shard goes to disk as soon
as it is full.

Of the 4-bit formats, other readers know two: nf4 and fp4 with scales nested by 256. config.json calls those
bitsandbytes' and names the layers that are dense, because readers build the model from that before they look at
a tensor. Any other format is called by a name of our own, so that nobody mistakes it.
"""

import json
import os
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import nf4
from models.attachment import attached
from models.errors import CheckpointError
from models.linear import AdaptableLinear, NF4Linear
from models.model import Model
from models.parallel.shares import refuse_shared
from models.whole import computed_parameters
from nf4 import QuantConfig, QuantizedTensor
from nf4.storage import BITSANDBYTES

SHARD_BYTES = 4 * 2**30
OUR_METHOD = "qlora-from-scratch"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those that bitsandbytes' kernels are compiled for


def save(model: Model, directory: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the model in the released names; quantized layers as bitsandbytes would save them."""
    refuse_shared(model, "saving a model")
    adapted = [name for name, m in model.named_modules() if isinstance(m, AdaptableLinear) and m.adapted]
    if adapted:
        raise ValueError(
            f"{len(adapted)} layers have adapters (first: {adapted[0]}); call save_adapter for those, "
            "or merge_adapter before saving the model"
        )
    if attached(model) is not None:
        raise ValueError("the model has an adapter; call save_adapter for it, or merge_adapter before saving the model")
    quantized = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    with CheckpointWriter(directory, shard_bytes) as writer:
        for name, value in computed_parameters(model):
            if name in quantized:
                writer.add(name, quantized[name].quantized)
            elif name.rpartition(".")[0] + ".weight" not in quantized or name.endswith(".bias"):
                writer.add(name, value)
        configs = [layer.quant_config for layer in quantized.values()]
        quantization = quantization_config(model, quantized, configs[0], model.dtype) if configs else None
        writer.finish(model.config.to_dict(), str(model.dtype), quantization)


class CheckpointWriter:
    """Collects tensors into shards; `finish` puts the whole checkpoint in place."""

    def __init__(self, directory: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.directory = Path(directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: is a file; a checkpoint is written into a directory")
        self.staging = self.directory.with_name(f".{self.directory.name}.partial-{os.getpid()}")
        self.shard_bytes = shard_bytes
        self.pending: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def __enter__(self) -> "CheckpointWriter":
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)

    def add(self, name: str, value: Tensor | QuantizedTensor) -> None:
        """One parameter; what was handed over before is written once a shard is full."""
        tensors = nf4.to_state_dict(value, name) if isinstance(value, QuantizedTensor) else {name: value}
        size = sum(t.nbytes for t in tensors.values())
        if self.pending and sum(t.nbytes for t in self.pending.values()) + size > self.shard_bytes:
            self.flush()
        self.pending |= {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        self.total_bytes += size

    def flush(self) -> None:
        save_file(self.pending, self.staging / f"shard-{len(self.shards)}", metadata={"format": "pt"})
        self.shards.append(list(self.pending))
        self.pending = {}

    def finish(self, config: dict[str, Any], dtype: str, quantization: dict[str, Any] | None = None) -> None:
        """Write what is left, the index and the config, and move all of it to its place.

        `quantization` is what `quantization_config` says of weights in 4 bits.
        """
        self.flush()
        count = len(self.shards)
        names = ["model.safetensors"]
        if count > 1:
            names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
            weight_map = {tensor: file for file, shard in zip(names, self.shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            self.write_json("model.safetensors.index.json", index)
        for i, name in enumerate(names):
            (self.staging / f"shard-{i}").rename(self.staging / name)
        config = {**config, "torch_dtype": dtype.removeprefix("torch.")}
        if quantization is not None:
            config["quantization_config"] = quantization
        self.write_json("config.json", config)
        self.move()

    def move(self) -> None:
        """Replace what a former save left; the config goes last, since without it nothing is a checkpoint."""
        for path in self.staging.iterdir():
            shutil.copymode(self.staging / "config.json", path)  # safetensors makes files that only their owner reads
            with path.open("rb") as f:
                os.fsync(f.fileno())
        if not self.directory.exists():
            self.staging.rename(self.directory)
            return
        new = {path.name for path in self.staging.iterdir()}
        for pattern in ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"):
            for old in self.directory.glob(pattern):
                if old.name not in new:
                    old.unlink()
        for name in sorted(new, key=lambda name: name == "config.json"):
            os.replace(self.staging / name, self.directory / name)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        (self.staging / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def quantization_config(
    model: Model, quantized: Collection[str], quant: QuantConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """What config.json says of the weights in 4 bits; `quantized` has their names, ending in `.weight`."""
    dense = dense_layers(model, quantized)
    if unknown_to_others(quant) or any(leaf(name.removesuffix(".weight")) in model.always_dense for name in quantized):
        return {"quant_method": OUR_METHOD, **asdict(quant), "dense_layers": dense}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant.codebook,
        "bnb_4bit_use_double_quant": quant.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }


def unknown_to_others(quant: QuantConfig) -> str | None:
    """Why other readers cannot use a 4-bit format, with what to do; None for those that they know."""
    if quant.codebook not in BITSANDBYTES:
        return f"codebook {quant.codebook} is known here alone; choose {' or '.join(BITSANDBYTES)}"
    if quant.block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        return f"block_size {quant.block_size} is known here alone; choose one of {sizes}"
    if quant.double_quant and quant.nested_block_size != 256:
        return f"nested_block_size {quant.nested_block_size} is known here alone; choose 256, or no double_quant"
    return None


def dense_layers(model: Model, quantized: Collection[str]) -> list[str]:
    """Every linear layer that is not in 4 bits, and the heads that a reader may build where this model has none."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | AdaptableLinear)]
    return sorted({name for name in linears if f"{name}.weight" not in quantized} | set(model.heads))


def leaf(name: str) -> str:
    return name.rpartition(".")[2]
