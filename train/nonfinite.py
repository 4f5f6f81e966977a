"""Where a step stopped being numbers: which layer, which examples; and its batch on disk, to look at it again.

The step is made once more from the same weights and the same seed, this time with an eye on what every layer gives and
on the gradient that comes back to it. What a layer gives comes in the order of the forward pass, so the first one that
is not finite is where it began; gradients come from the end of the model, and the first broken one lies just before
what broke it. Several processes make it again together, each with its own micro-batches, and one of them writes.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from models.errors import NonFiniteError
from models.parallel import world
from train.data.batches import Batch
from train.passes import Passes
from train.seed import seed_step
from train.step import BrokenStep


@dataclass(frozen=True)
class Place:
    """The layer where numbers stopped being numbers."""

    layer: str
    what: str
    """output or gradient."""
    micro_batch: int
    """Which of the step's micro-batches it was, from 0."""


def report(
    directory: Path, passes: Passes, micro_batches: Sequence[Batch], broken: BrokenStep, seed: int
) -> NonFiniteError:
    """Find where a step broke, write its batch and a report into the directory, and give the error that says so."""
    broke = {name: p.grad is not None and not finite(p.grad) for name, p in passes.moved.items()}
    anywhere = world.most(*broke.values())
    gradients = [name for name, it in zip(broke, anywhere, strict=True) if it]
    passes.zero_grad()
    batches = of_all(micro_batches)
    origin = find(passes, micro_batches, seed, broken.number)
    passes.zero_grad()
    guilty = batches if origin is None else [batch for batch in batches if batch.number == origin.micro_batch]
    examples = [where for batch in guilty for where in batch.where]
    if world.is_main():
        write(directory, batches, broken, seed, origin, gradients)
    return NonFiniteError(said(broken, origin, gradients, examples, directory))


def of_all(micro_batches: Sequence[Batch]) -> list[Batch]:
    """The micro-batches of all processes, or the parts of them, in order."""
    mine = [batch for batch in micro_batches if len(batch.inputs["input_ids"])]
    return sorted((batch for own in world.from_all(mine) for batch in own), key=lambda batch: batch.number)


def write(
    directory: Path,
    batches: Sequence[Batch],
    broken: BrokenStep,
    seed: int,
    origin: Place | None,
    gradients: Sequence[str],
) -> None:
    """Leave the step's batch and the report."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"{i}.{name}": t.contiguous() for i, batch in enumerate(batches) for name, t in batch.inputs.items()}
    save_file(tensors, directory / "batch.safetensors", {"format": "pt"})
    content: dict[str, Any] = {
        "step": broken.number,
        "seed": seed,
        "loss": str(broken.loss),
        "grad_norm": str(broken.grad_norm),
        "origin": None if origin is None else asdict(origin),
        "parameters": gradients,
        "examples": [list(batch.where) for batch in batches],
    }
    (directory / "report.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def said(broken: BrokenStep, origin: Place | None, gradients: list[str], examples: list[str], directory: Path) -> str:
    """The error's words."""
    if origin is None:
        place = (
            f"first parameter with such a gradient: {gradients[0]}" if gradients else "no layer shows it when repeated"
        )
    elif origin.what == "output":
        place = f"it begins in the output of {origin.layer}"
    else:
        place = f"it begins in the gradient that reaches the output of {origin.layer}"
    shown = ", ".join(examples[:4]) + (f" and {len(examples) - 4} more" if len(examples) > 4 else "")
    return (
        f"step {broken.number}: the loss is {broken.loss} and the gradient norm {broken.grad_norm}; {place}"
        f"{f', on {shown}' if shown else ''}. The parameters are still those of step {broken.number - 1}; the batch is "
        f'in {directory}. Try a lower optimizer.learning_rate, or dtype = "float32"'
    )


def find(passes: Passes, micro_batches: Sequence[Batch], seed: int, number: int) -> Place | None:
    """The first layer whose output, or else the first whose gradient, is not finite; None if all are this time.

    In each round the processes look at what all of them have found, so that none waits for one that has stopped.
    """
    model = passes.model
    for batch in micro_batches:
        counts = bool(model.label_count(batch.inputs["labels"]))
        if not counts and world.size() == 1:
            continue  # as in the step: the mean over no label would be nan
        seed_step(seed, number, batch.number)
        watch = Watch(model)
        with watch:
            loss = model.loss(**(batch if counts else batch.stand_in()).to(passes.device).inputs)
            watch.forward = False  # blocks that are computed again in the backward pass say nothing new
            if watch.output is None and not finite(loss):
                watch.output = "the loss itself"
            if not any(world.most(watch.output is not None)):
                loss.backward()
        found = Place(watch.output, "output", batch.number) if watch.output is not None else None
        if found is None and watch.gradient is not None:
            found = Place(watch.gradient, "gradient", batch.number)
        places = [place for place in world.from_all(found) if place is not None]
        if places:
            return min(places, key=lambda place: place.micro_batch)
    return None


class Watch:
    """While entered, notes the first module whose output, and the first whose output's gradient, is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.forward = model, True
        self.output: str | None = None
        self.gradient: str | None = None

    def __enter__(self) -> "Watch":
        self.stack = ExitStack()
        for name, module in self.model.named_modules():
            handle = module.register_forward_hook(partial(self.seen, name or type(self.model).__name__))
            self.stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def seen(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Look at what a module gives, and ask to be shown its gradient."""
        if not self.forward:
            return
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                if self.output is None and not finite(tensor):
                    self.output = name
                if tensor.requires_grad:
                    tensor.register_hook(partial(self.came_back, name))

    def came_back(self, name: str, gradient: Tensor) -> None:
        if self.gradient is None and not finite(gradient):
            self.gradient = name


def finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())
