"""The training loop: how many steps, at which rate, on which micro-batches, and what is written down of each.

What the loop itself has to remember from one step to the next is one small object, `LoopState`.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from models.errors import ConfigError, DataError, NonFiniteError
from train.data.batches import Batch
from train.interrupt import Interrupt
from train.memory import peak_memory_bytes
from train.optimizer import OptimizerConfig, make_optimizer, set_learning_rate
from train.plot import plot_runs
from train.progress import Progress
from train.run import Run
from train.schedule import learning_rate
from train.step import update


@runtime_checkable
class BatchSource(Protocol):
    """Micro-batches in an order that the epoch's number, counted from 0, alone decides."""

    def count(self, number: int) -> int:
        """Say how many micro-batches an epoch has."""
        ...

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Give the micro-batches of an epoch from position `start` on."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train, in which steps, and when to look at held-out examples."""

    batch_size: int = 1
    """Examples in a micro-batch, which is what must fit into memory at once; packed rows, with data.pack."""
    batch_tokens: int | None = None
    """Tokens in a micro-batch at most, padding included; if set, batch_size is ignored."""
    accumulation: int = 16
    """Micro-batches in a step of the optimizer."""
    max_steps: int | None = None
    """How many steps to make; give this or epochs."""
    epochs: float | None = None
    """How often to go through the data; give this or max_steps."""
    eval_steps: int | None = None
    """Held-out loss every so many steps; before the first and after the last step in any case."""
    log_every: int = 10
    """Steps between the lines of log.txt."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the adapters are moved."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_tokens", "accumulation", "max_steps", "eval_steps", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.epochs is not None and not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise ValueError(f"epochs must be above 0, not {self.epochs}")
        if (self.max_steps is None) == (self.epochs is None):
            came = "neither" if self.epochs is None else f"{self.max_steps} and {self.epochs}"
            raise ValueError(f"exactly one of max_steps and epochs says how long to train; got {came}")


@dataclass
class LoopState:
    """How far a run is: all that the loop itself remembers from one step to the next."""

    step: int = 0
    """Steps made."""
    epoch: int = 0
    """The epoch of the next micro-batch."""
    batch: int = 0
    """The next micro-batch's position in that epoch."""
    tokens: int = 0
    """Tokens read, padding not counted."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    state: LoopState
    status: Literal["done", "interrupted"]
    loss: float | None
    """Training loss of the last step; None if there was none."""
    evaluations: tuple[dict[str, int | float], ...] = ()
    """What eval_fn gave after each step that it was called with; first and last are before and after training."""
    seconds: float = 0.0
    peak_memory: int = 0
    """In bytes; of tensors on a CUDA device, of the whole process on a CPU."""
    state_bytes: int = 0
    """What the optimizer's states took."""
    managed_bytes: int = 0
    """Those of them in managed memory, which `peak_memory` doesn't count."""
    signal: int | None = None
    """The signal that interrupted; the process should exit with 128 + signal."""


def train(
    model: Any,
    batches: BatchSource,
    config: LoopConfig,
    run: Run,
    *,
    eval_fn: Callable[[int], dict[str, int | float]] | None = None,
    state: LoopState | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train every parameter that requires a gradient, and say how it went.

    Before, the caller seeds (`seed_everything`), attaches adapters and moves the model; afterwards it saves
    the adapter and sets the run's STATUS to done. An interrupted run returns after the step it was in, with
    its STATUS set.
    """
    started = time.perf_counter()
    state = state or LoopState()
    evaluations: list[dict[str, int | float]] = []
    step = None
    with run, ExitStack() as stack:
        parameters = trainable(model)
        device = next(iter(parameters.values())).device
        total = total_steps(config, batches)
        optimizer = stack.enter_context(make_optimizer(parameters, config.optimizer))  # its memory goes with the block
        clip = config.optimizer.max_grad_norm
        progress = Progress(total, done=state.step, every=config.log_every, quiet=quiet, write=run.log)

        def evaluate() -> None:
            if eval_fn:
                values = eval_fn(state.step)
                model.train()
                if not math.isfinite(values["loss"]):
                    raise NonFiniteError(f"the held-out loss after step {state.step} is {values['loss']}")
                evaluations.append({"step": state.step, **values})
                run.metrics(state.step, "eval", **values)
                progress.say(f"step {state.step}/{total}  held-out loss {values['loss']:.4f}")

        try:
            with progress, Interrupt() as interrupt:
                model.train()
                if state.step == 0:
                    evaluate()
                for micro_batches in accumulated(batches, config.accumulation, state, total):
                    began = time.perf_counter()
                    rate = learning_rate(state.step + 1, total, config.optimizer)
                    set_learning_rate(optimizer, rate)
                    step = update(model, parameters, optimizer, micro_batches, state.step + 1, clip)
                    state.step += 1
                    state.tokens += step.tokens
                    run.metrics(state.step, "train", lr=rate, **step._asdict())
                    seconds = time.perf_counter() - began
                    speed, memory = step.tokens / seconds, peak_memory_bytes(device)
                    run.timing(state.step, seconds=seconds, tokens_per_second=speed, peak_memory=memory)
                    progress.step(state.step, step.loss, rate, speed, memory)
                    if config.eval_steps and state.step % config.eval_steps == 0 and state.step < total:
                        evaluate()
                    if interrupt.signal is not None:
                        break
                if state.step == total:
                    evaluate()
        finally:
            plot_runs([run.directory], run.directory / "plots" / "loss.png")
        done = state.step == total
        state_bytes, managed_bytes = optimizer.state_bytes, optimizer.managed_bytes
        if not done:
            run.status(f"interrupted@{state.step}")
    return TrainResult(
        state=state,
        status="done" if done else "interrupted",
        loss=step.loss if step else None,
        evaluations=tuple(evaluations),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory_bytes(device),
        state_bytes=state_bytes,
        managed_bytes=managed_bytes,
        signal=interrupt.signal,
    )


def trainable(model: Any) -> dict[str, nn.Parameter]:
    """Give what is to be trained, by name."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not parameters:
        raise ConfigError("the model has no trainable parameter; attach adapters before training")
    return parameters


def total_steps(config: LoopConfig, batches: BatchSource) -> int:
    """Give the number of steps; an epoch ends with a smaller one where accumulation does not divide it."""
    if batches.count(0) < 1:
        raise DataError("there is no batch to train on; check the data file and data.eval_size")
    if config.max_steps is not None:
        return config.max_steps
    assert config.epochs is not None

    def steps(epoch: int) -> int:
        return math.ceil(batches.count(epoch) / config.accumulation)

    whole = math.floor(config.epochs)
    rest = config.epochs - whole
    return sum(steps(epoch) for epoch in range(whole)) + (math.ceil(round(rest * steps(whole), 6)) if rest else 0)


def accumulated(batches: BatchSource, accumulation: int, state: LoopState, total: int) -> Iterator[list[Batch]]:
    """Give the micro-batches of each step, from where the state is, moving its position on.

    A step never spans two epochs.
    """
    while state.step < total:
        epoch = iter(batches.epoch(state.epoch, state.batch))
        while state.step < total and (group := list(islice(epoch, accumulation))):
            state.batch += len(group)
            yield group
        if state.batch == 0:
            raise DataError(f"epoch {state.epoch} has no batch to train on")
        if state.step < total:
            state.epoch, state.batch = state.epoch + 1, 0
