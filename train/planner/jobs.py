"""From what a person asks for to a job: a model by name, by its config.json or by its checkpoint, and the settings."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models import LoraConfig, PrefixConfig
from models.checkpoint import linear_weights, matched, open_checkpoint, released_config, skeleton
from models.errors import CheckpointError
from models.precision import stored_format
from models.readers import read_json
from nf4 import QuantConfig
from train.optimizer import OptimizerConfig
from train.planner.sizes import SIZES
from train.planner.step import Job

WEIGHTS = ("*.safetensors*", "*.bin*")
CLASSIFIER = "classifier"


class Described(NamedTuple):
    """A model without its weights."""

    raw: Mapping[str, Any]
    where: str
    tensors: tuple[str, ...] = ()
    """Names in the checkpoint, if there is one."""
    stored: QuantConfig | None = None
    """How the checkpoint has its linear layers in few bits already."""


def job_of(config: Any, dtype: torch.dtype, max_len: int, target_len: int = 128, processes: int = 1) -> Job:
    """The job of a run's settings (those of `qlora train` or `qlora estimate`) with texts of so many tokens.

    Where it is to be decided whether the model is shared, the job is one with whole models.
    """
    model = described(config.model)
    quant = (model.stored or config.quant) if config.quantize else model.stored
    adapters, method = getattr(config, "adapters", True), getattr(config, "method", "lora")
    job = Job(
        raw=model.raw,
        where=model.where,
        tensors=model.tensors,
        dtype=dtype,
        quant=quant,
        lora=getattr(config, method) if adapters else None,
        gradient_checkpointing=config.gradient_checkpointing,
        optimizer=config.optimizer,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        max_len=max_len,
        target_len=target_len,
        processes=processes,
        distributed="fsdp" if config.distributed == "fsdp" else "ddp",
        fsdp=config.fsdp,
    )
    return with_classifier(job) if model.raw.get("model_type") == "roberta" else job


def described(model: str) -> Described:
    """The config of a model that is named in `sizes.py`, or is at a path."""
    name = model.lower()
    if name in SIZES:
        return Described(SIZES[name], name)
    path = Path(model)
    if not path.exists():
        near = difflib.get_close_matches(name, SIZES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise CheckpointError(f"model: {model} is no path and no model known by name{hint}; {', '.join(SIZES)} are")
    if path.suffix == ".json":
        return Described(read_json(path), str(path))
    if path.is_dir() and (path / "config.json").exists() and not any(any(path.glob(kind)) for kind in WEIGHTS):
        return Described(released_config(path), str(path / "config.json"))
    raw, reader, where = open_checkpoint(path)
    names = tuple(reader.shapes)
    stored = None
    if any(".quant_state." in name for name in names):
        skeletal = skeleton(raw, where, reader)
        source = matched(skeletal, reader)
        linears = linear_weights(skeletal)
        weight = next((name for name in source.stored if name in linears), None)
        if weight is not None:
            codebook, state = stored_format(weight, source)
            nested = "nested_blocksize" in state
            stored = QuantConfig(codebook, state["blocksize"], nested, state.get("nested_blocksize", 256))
    return Described(raw, where, names, stored)


def with_classifier(job: Job) -> Job:
    """A RoBERTa labels texts: with the classifier that its checkpoint has, or a new one, which is trained whole."""
    held = any(name.startswith("classifier.") for name in job.tensors)
    labels = None if held else len(job.raw.get("id2label") or ()) or 2
    lora = job.lora
    if lora is not None and not isinstance(lora, PrefixConfig) and CLASSIFIER not in lora.modules_to_save:
        lora = replace(lora, modules_to_save=(*lora.modules_to_save, CLASSIFIER))
    return replace(job, head=None if held else "classification", num_labels=labels, lora=lora)


def paper_job(name: str, double_quant: bool = True) -> Job:
    """One of the paper's: NF4, rank 64 on all linear layers, one text of 512 tokens, checkpointing, paged AdamW."""
    return Job(
        raw=SIZES[name],
        where=name,
        quant=QuantConfig(double_quant=double_quant),
        lora=LoraConfig(rank=64, dropout=0.1 if name in ("llama-7b", "llama-13b") else 0.05),
        optimizer=OptimizerConfig(name="paged-adamw"),
    )
