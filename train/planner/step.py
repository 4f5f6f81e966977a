"""The step that is planned and the step that is measured: one code, on tensors without memory or with it.

A model is put together as loading does, with random weights where there is memory; adapters are attached; a first
step gives the optimizer its states, and a second one, of up to two micro-batches, is like all that follow it:
gradients are there while the second micro-batch is computed.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

import kernels
from models import AdapterConfig, LoraConfig, PrefixConfig, attach
from models.architectures import build
from models.checkpoint import linear_weights, place
from models.errors import ConfigError
from models.model import Model
from models.parallel.shard import ShardConfig, shard
from models.t5 import T5
from models.whole import train_whole
from nf4 import QuantConfig
from nf4.sizes import without_memory
from train.data.batches import Batch
from train.optimizer import OptimizerConfig, make_optimizer
from train.paged.fused import FusedOptimizer
from train.passes import Passes, passes_of
from train.step import update

NORM = 0.3
PADDED = 2  # ids below are padding or begin a text in some models


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that decides how much memory a step takes."""

    raw: Mapping[str, Any]
    """The model's config.json."""
    where: str = "config.json"
    """What to call it in errors."""
    tensors: tuple[str, ...] = ()
    """Names in the checkpoint, by which some heads are known."""
    head: str | None = None
    num_labels: int | None = None
    dtype: torch.dtype = torch.bfloat16
    quant: QuantConfig | None = QuantConfig()
    """How block linears are stored; None: in `dtype`."""
    lora: AdapterConfig | None = LoraConfig()
    """The adapters, mostly LoRA's but of any method; None: every weight is trained."""
    gradient_checkpointing: bool = True
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: int = 1
    accumulation: int = 16
    max_len: int = 512
    """Tokens of each example, of an encoder's text where there are two."""
    target_len: int = 128
    """Tokens that a decoder writes."""
    processes: int = 1
    """Each with a device of its own."""
    distributed: Literal["ddp", "fsdp"] = "ddp"
    """Whether each has the whole model, or a share."""
    fsdp: ShardConfig = field(default_factory=ShardConfig)
    """How it is shared."""

    @property
    def rounds(self) -> int:
        """Micro-batches of a step that one process has at most."""
        return -(-self.accumulation // self.processes)

    @property
    def shared(self) -> bool:
        """Whether a process has a share of the model only."""
        return self.processes > 1 and self.distributed == "fsdp"


@dataclass
class Stepper:
    """A model that is ready to train, with its optimizer."""

    job: Job
    model: Model
    passes: Passes
    optimizer: FusedOptimizer
    batch: Batch

    def step(self, micro_batches: int) -> None:
        """A step as any but the first, which also looks at the values of gradients, and here there may be none."""
        update(self.passes, self.optimizer, [self.batch] * micro_batches, 2, NORM)


def prepared(job: Job, device: torch.device) -> Stepper:
    """The model with its adapters, and its optimizer, which has no states yet.

    Several processes that are there share it. One that plans has it whole, and makes it shared by itself.
    """
    model = assembled(job, device)
    model.requires_grad_(False)
    if job.lora is None:
        train_whole(model, dict(model.named_parameters()), torch.float32)
    else:
        try:
            attach(model, plainly_started(job.lora))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    model.gradient_checkpointing = job.gradient_checkpointing
    model.train()
    batch = batch_for(model, job)
    if job.shared and device.type != "meta":
        shard(model, device, job.fsdp)
    passes = passes_of(model)
    return Stepper(job, model, passes, make_optimizer(passes.moved, job.optimizer), batch)


def plainly_started(config: AdapterConfig) -> AdapterConfig:
    """The same adapters with a start that needs no values of the model; every start has the same sizes."""
    if isinstance(config, LoraConfig):
        return replace(config, init="default")
    return replace(config, init="normal", init_text="") if isinstance(config, PrefixConfig) else config


def steps_taken(stepper: Stepper, between: Callable[[], None] = lambda: None) -> None:
    """Take the step that makes the states, call `between`, and take the step that is planned."""
    stepper.step(1)
    between()
    stepper.step(min(stepper.job.rounds, 2))


def assembled(job: Job, device: torch.device) -> Model:
    """The model of a config, its weights random or without memory."""
    with torch.device("meta"), without_notes():
        model = build(dict(job.raw), job.where, job.tensors, job.head, job.num_labels)
    model.check_dtype(job.dtype)
    linears = linear_weights(model)
    generator = None if device.type == "meta" else torch.Generator().manual_seed(0)
    for name, shape in {name: p.shape for name, p in model.named_parameters()}.items():
        quant = job.quant if name in linears and not linears[name].in_head else None
        if quant is not None and device.type == "meta":
            place(model, name, without_memory(shape, job.dtype, quant))
            continue
        weight = torch.empty(shape, dtype=job.dtype, device=device)
        if generator is not None:
            weight.copy_(torch.ones(()) if "norm" in name.lower() else torch.randn(shape, generator=generator) * 0.02)
        place(model, name, weight if quant is None else kernels.quantize(weight, quant))
    return model


@contextmanager
def without_notes() -> Iterator[None]:
    """A time in which nobody is told that a head starts from random weights."""
    log = logging.getLogger("models.roberta_layout")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def batch_for(model: Model, job: Job) -> Batch:
    """A full batch of which everything is learned: the most that a batch of this size can take."""
    B, T = job.batch_size, job.max_len
    most = model.max_tokens
    if most is not None and most < T:
        raise ConfigError(f"max_len is {T}, but the model knows {most} positions; set it to {most} or less")
    ids = torch.full((B, T), min(PADDED + 1, model.embedding.num_embeddings - 1))
    mask = torch.ones_like(ids)
    labels = ids
    if isinstance(model, T5):
        labels = ids.new_full((B, job.target_len), int(ids[0, 0]))
    elif getattr(model, "classifier", None) is not None:
        labels = torch.zeros(B, dtype=torch.long)
    return Batch({"input_ids": ids, "attention_mask": mask, "labels": labels})
