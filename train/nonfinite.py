"""Where a step stopped being numbers: which layer, which examples; and its batch on disk, to look at it again.

The step is made once more from the same weights and the same seed, this time with an eye on what every layer gives and
on the gradient that comes back to it. What a layer gives comes in the order of the forward pass, so the first one that
is not finite is where it began; gradients come from the end of the model, and the first broken one lies just before
what broke it.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from models.errors import NonFiniteError
from train.data.batches import Batch
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
    directory: Path,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    micro_batches: Sequence[Batch],
    broken: BrokenStep,
    seed: int,
) -> NonFiniteError:
    """Find where a step broke, write its batch and a report into the directory, and give the error that says so."""
    gradients = [name for name, p in parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
    for parameter in parameters.values():
        parameter.grad = None
    origin = find(model, parameters, micro_batches, seed, broken.number)
    for parameter in parameters.values():
        parameter.grad = None
    guilty = micro_batches if origin is None else [micro_batches[origin.micro_batch]]
    examples = [where for batch in guilty for where in batch.where]

    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{i}.{name}": t.contiguous() for i, batch in enumerate(micro_batches) for name, t in batch.inputs.items()
    }
    save_file(tensors, directory / "batch.safetensors", {"format": "pt"})
    content: dict[str, Any] = {
        "step": broken.number,
        "seed": seed,
        "loss": str(broken.loss),
        "grad_norm": str(broken.grad_norm),
        "origin": None if origin is None else asdict(origin),
        "parameters": gradients,
        "examples": [list(batch.where) for batch in micro_batches],
    }
    (directory / "report.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return NonFiniteError(said(broken, origin, gradients, examples, directory))


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


def find(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], micro_batches: Sequence[Batch], seed: int, number: int
) -> Place | None:
    """The first layer whose output, or else the first whose gradient, is not finite; None if all are this time."""
    device = next(iter(parameters.values())).device
    seed_step(seed, number)
    for index, batch in enumerate(micro_batches):
        if not model.label_count(batch.inputs["labels"]):  # pyrefly: ignore[not-callable]
            continue  # as in the step: the mean over no label would be nan
        watch = Watch(model)
        with watch:
            loss = model.loss(**batch.to(device).inputs)  # pyrefly: ignore[not-callable]
            watch.forward = False  # blocks that are computed again in the backward pass say nothing new
            if watch.output is None and bool(loss.isfinite().all()):
                loss.backward()
        if watch.output is None and not bool(loss.isfinite().all()):
            return Place("the loss itself", "output", index)
        if watch.output is not None:
            return Place(watch.output, "output", index)
        if watch.gradient is not None:
            return Place(watch.gradient, "gradient", index)
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
