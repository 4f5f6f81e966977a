"""The training loop: how many steps, at which rate, on which micro-batches, what is written down, and when it is saved.

Within a step the order is: the step, its metrics, an evaluation if one is due, a checkpoint if one is due. So a
checkpoint comes with everything that was written about its step, and a run that goes on from it writes what a run that
was never stopped would have written.

Several processes run this loop together, each on its part of every step's micro-batches, and one of them writes. They
take the same way at each turn of it: what only one knows, a signal that came or a request to save, is agreed on first.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from models.errors import ConfigError, DataError, NonFiniteError, WriteError
from models.parallel import world
from models.trained import restore_trained, save_trained
from train import nonfinite
from train.data.batches import Batch
from train.data.dealing import dealt
from train.interrupt import Interrupt
from train.memory import peak_memory_bytes
from train.optimizer import OptimizerConfig, make_optimizer, set_learning_rate
from train.paged.fused import FusedOptimizer
from train.passes import Passes, passes_of
from train.plot import plot_runs
from train.progress import Progress
from train.run import Run, read_metrics
from train.schedule import learning_rate
from train.seed import seed_step
from train.snapshot import Snapshot, room, save_snapshot
from train.spikes import Spikes
from train.state import LoopState
from train.step import BrokenStep, dry_step, update


@runtime_checkable
class BatchSource(Protocol):
    """Micro-batches in an order that the epoch's number, counted from 0, alone decides."""

    def count(self, number: int) -> int:
        """Say how many micro-batches an epoch has."""
        ...

    def micro_batch(self, number: int, place: int, part: int = 0, parts: int = 1) -> Batch:
        """Give the one at a place in an epoch; or a part of its rows, of so many, which may have none."""
        ...


@runtime_checkable
class Watcher(Protocol):
    """Looks at the model between steps, leaves what it finds in the run, and gives lines to be shown."""

    @property
    def eval_steps(self) -> int | None:
        """Every so many steps; None: at each evaluation."""
        ...

    def __call__(self, step: int) -> list[str]:
        """Look at the model after a step."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train, in which steps, and when to look at held-out examples."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("max_steps", "epochs"),)
    """Settings of which a later one takes the place of another: an own number of epochs, of a preset's steps."""

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
    save_steps: int = 250
    """A checkpoint every so many steps, 0 for never; after the last step, on Ctrl-C and on `touch RUN/save` always."""
    keep_checkpoints: int = 3
    """How many of them stay."""
    dry_step: bool = True
    """Try the longest batch before the first step, so that memory runs out at once if it does at all."""
    log_every: int = 10
    """Steps between the lines of log.txt."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the adapters are moved."""

    def __post_init__(self) -> None:
        counts = ("batch_size", "batch_tokens", "accumulation", "max_steps", "log_every")
        for name in (*counts, "eval_steps", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.save_steps < 0:
            raise ValueError(f"save_steps must be at least 0, not {self.save_steps}")
        if self.epochs is not None and not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise ValueError(f"epochs must be above 0, not {self.epochs}")
        if (self.max_steps is None) == (self.epochs is None):
            came = "neither" if self.epochs is None else f"{self.max_steps} and {self.epochs}"
            raise ValueError(f"exactly one of max_steps and epochs says how long to train; got {came}")


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    state: LoopState
    status: Literal["done", "interrupted"]
    loss: float | None
    """Training loss of the last step; None if there was none."""
    evaluations: tuple[dict[str, int | float], ...] = ()
    """What eval_fn gave after each step that it was called with, also before the run was stopped and went on."""
    seconds: float = 0.0
    """Of this process."""
    peak_memory: int = 0
    """In bytes; of tensors on a CUDA device, of the whole process on a CPU. Of several that which took most."""
    state_bytes: int = 0
    """What the optimizer's states took, in the process where they took most."""
    managed_bytes: int = 0
    """Those of them in managed memory, which `peak_memory` doesn't count."""
    signal: int | None = None
    """The signal that interrupted, if the run is not done; the process should exit with 128 + signal."""


def train(
    model: Any,
    batches: BatchSource,
    config: LoopConfig,
    run: Run,
    *,
    seed: int,
    eval_fn: Callable[[int], dict[str, int | float]] | None = None,
    watchers: Sequence[Watcher] = (),
    begin: Snapshot | None = None,
    save: Callable[[Any, Path], None] = save_trained,
    restore: Callable[[Any, Path], None] = restore_trained,
    quiet: bool = False,
) -> TrainResult:
    """Train every parameter that requires a gradient, from the beginning or from a snapshot, and say how it went.

    At each evaluation `eval_fn` gives what is measured; the `watchers` look for themselves.

    Before, the caller seeds (`seed_everything`), attaches adapters and moves the model; afterwards it saves
    the adapter and sets the run's STATUS to done. An interrupted run returns after the step it was in, with
    a checkpoint made and its STATUS set. `save` and `restore` are what a checkpoint does with the weights.
    """
    started = time.perf_counter()
    main = world.is_main()
    with run, world.doing("the training"), room(run), ExitStack() as stack:
        passes = passes_of(model)
        total = total_steps(config, batches)
        optimizer = stack.enter_context(
            make_optimizer(passes.moved, config.optimizer)
        )  # its memory goes with the block
        state, notes = LoopState(), list[str]()
        if begin is not None:
            notes = going_on(begin, total, config.optimizer)
            state = begin.restore(passes, optimizer, restore)
            notes += run.go_on(config, begin.journals)
            run.step = state.step
        spikes = Spikes(written(run))
        progress = Progress(total, done=state.step, every=config.log_every, quiet=quiet or not main, write=run.log)
        asked = run.directory / "save"

        def due(steps: int | None) -> bool:
            return evaluation_due(state, steps or config.eval_steps, total)

        def evaluate() -> None:
            if eval_fn and due(None):
                seed_step(seed, state.step)
                values = eval_fn(state.step)
                model.train()
                if not math.isfinite(values["loss"]):
                    raise NonFiniteError(f"the held-out loss after step {state.step} is {values['loss']}")
                run.metrics(state.step, "eval", **values)
                progress.say(f"step {state.step}/{total}  held-out loss {values['loss']:.4f}")
            for watcher in watchers:
                for line in watcher(state.step) if due(watcher.eval_steps) else ():
                    progress.say(line)
            state.evaluated = state.step

        def checkpoint() -> None:
            keep = config.keep_checkpoints
            place = save_snapshot(run, passes, optimizer, state, total=total, keep=keep, save=save)
            run.log(f"step {state.step}/{total}  saved {place.relative_to(run.directory)}")
            if main:
                asked.unlink(missing_ok=True)

        def step(micro_batches: list[Batch]) -> None:
            progress.begin()
            began = time.perf_counter()
            number = state.step + 1
            rate = learning_rate(number, total, config.optimizer)
            set_learning_rate(optimizer, rate)
            try:
                with world.doing(f"the gradients of step {number}"):
                    made = update(passes, optimizer, micro_batches, number, config.optimizer.max_grad_norm, seed)
            except BrokenStep as broken:
                directory = run.directory / "nonfinite" / f"step-{number:06d}"
                raise nonfinite.report(directory, passes, micro_batches, broken, seed) from broken
            state.step = number
            state.tokens += made.tokens
            run.metrics(number, "train", lr=rate, **made._asdict())
            seconds = time.perf_counter() - began
            speed, memory = made.tokens / seconds, peak()
            run.timing(number, seconds=seconds, tokens_per_second=speed, peak_memory=memory)
            progress.step(number, made.loss, rate, speed, memory)
            for remark in spikes.step(number, made.loss, made.labels, made.tokens, micro_batches):
                run.log(remark)

        def peak() -> int:
            return int(world.most(peak_memory_bytes(passes.device))[0])

        def wishes() -> tuple[int, bool]:
            """The signal that came to any process, 0 for none; and whether somebody wants a checkpoint."""
            signal, wanted = world.most(interrupt.signal or 0, main and asked.exists())
            return int(signal), bool(wanted)

        def draw() -> None:
            if main:
                plot_runs([run.directory], run.directory / "plots" / "loss.png")

        try:
            with progress, Interrupt() as interrupt:
                model.train()
                for note in notes:
                    progress.say(note)
                if config.dry_step and state.step < total:
                    with world.doing("a trial of the longest batch"):
                        try_longest(passes, optimizer, batches, state, config.accumulation)
                groups = accumulated(batches, config.accumulation, state, total)
                while True:
                    signal, wanted = wishes()
                    if not signal and any(map(due, (None, *(it.eval_steps for it in watchers)))):
                        with world.doing(f"the evaluation after step {state.step}"):
                            evaluate()
                        signal, wanted = wishes()
                    if signal or wanted or checkpoint_due(state, config, total):
                        with world.doing(f"the checkpoint of step {state.step}"):
                            checkpoint()
                    if signal or state.step >= total:
                        break
                    step(next(groups))
            done = state.step >= total and state.evaluated == state.step
            if not done:
                run.status(f"interrupted@{state.step}")
            draw()
        except Exception as error:
            if not isinstance(error, (OSError, WriteError)):
                draw()
            raise
        state_bytes, managed_bytes = map(int, world.most(optimizer.state_bytes, optimizer.managed_bytes))
        memory = peak()
    lines = written(run)
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    return TrainResult(
        state=state,
        status="done" if done else "interrupted",
        loss=losses[-1] if losses else None,
        evaluations=tuple(without_split(line) for line in lines if line["split"] == "eval"),
        seconds=time.perf_counter() - started,
        peak_memory=memory,
        state_bytes=state_bytes,
        managed_bytes=managed_bytes,
        signal=None if done else signal,
    )


def written(run: Run) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, which the main process reads for all."""
    return world.from_main(read_metrics(run.directory) if world.is_main() else [])


def going_on(begin: Snapshot, total: int, config: OptimizerConfig) -> list[str]:
    """Say from where a run goes on, and whether it now has another schedule."""
    made = begin.state.step
    if made > total:
        raise ConfigError(f"the run has made {made} steps already, which is more than the {total} that are asked for")
    said = [f"going on after step {made}/{total}, from {begin.directory}"]
    before, now = ([learning_rate(i + 1, n, config) for i in range(made)] for n in (begin.total, total))
    if before != now:
        said.append(
            f"the run is {total} steps long now and was {begin.total}, and its learning rate depends on that: the "
            f"{made} steps before had the rates of the one, those to come have the rates of the other"
        )
    return said


def evaluation_due(state: LoopState, steps: int | None, total: int) -> bool:
    """Whether what is measured every so many steps is to be after this one, and has not been."""
    regular = steps is not None and state.step % steps == 0
    return state.evaluated < state.step and (regular or state.step == 0 or state.step >= total)


def checkpoint_due(state: LoopState, config: LoopConfig, total: int) -> bool:
    regular = config.save_steps > 0 and state.step > 0 and state.step % config.save_steps == 0
    return regular or state.step >= total


def try_longest(
    passes: Passes, optimizer: FusedOptimizer, batches: BatchSource, state: LoopState, accumulation: int
) -> None:
    """Make a dry step on the longest batch, of a source that knows which one it is.

    Of that a process gets a part if there are fewer micro-batches than processes.
    """
    longest = getattr(batches, "longest", None)
    if longest is not None:
        parts = max(1, world.size() // accumulation)
        dry_step(passes, optimizer, longest(state.epoch, parts))


def without_split(line: dict[str, Any]) -> dict[str, int | float]:
    return {name: value for name, value in line.items() if name != "split"}


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
    """Give this process's micro-batches of each step, from where the state is, moving its position on.

    A step never spans two epochs.
    """
    while state.step < total:
        count = batches.count(state.epoch)
        if not count:
            raise DataError(f"epoch {state.epoch} has no batch to train on")
        while state.step < total and state.batch < count:
            first = state.batch
            state.batch = min(first + accumulation, count)
            yield [
                replace(
                    batches.micro_batch(state.epoch, first + it.micro_batch, it.part, it.parts), number=it.micro_batch
                )
                for it in dealt(state.batch - first, world.rank(), world.size())
            ]
        if state.step < total:
            state.epoch, state.batch = state.epoch + 1, 0
