"""How gradients come about in a step: in one process, or in several of which each has taken some micro-batches.

Three ways with one interface. Alone, a backward pass adds to the gradients, and that is all. With several processes
their gradients are summed in the last pass of a step, and before it each adds up its own. Where each has the whole
model (DDP) torch sums gradients while the last pass still goes on, and all processes make the same update. Where each
has its rows of it (FSDP2) a process gets the summed gradients of its own rows, and moves those alone.

Sums are sums, not means: a loss is already divided by the label tokens of all processes. Gradients that wait for the
last pass are whole on every process, also under FSDP: four bytes for every trained number in float32, which is little
for adapters and as much as the weights where all of them are trained. (With one round in a step nothing waits.)
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.errors import CheckpointError, ConfigError
from models.parallel import shares, world
from train.data.batches import Batch


class Passes:
    """The way of one process, and what the others have in common with it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameters = trainable(model)
        """What is trained, as the model has it, by name."""
        self.moved: dict[str, nn.Parameter] = self.parameters
        """What the optimizer of this process moves: plain tensors over the same memory, this process's part of each."""
        self.device = shares.home(next(iter(self.parameters.values())))
        """Where batches go."""

    def backward(self, batch: Batch, weight: float, last: bool) -> Tensor:
        """Add a share of the gradient of a batch's loss, and give that share of the loss.

        In a step all processes call it equally often; after the `last` time gradients are those of all of them.
        """
        loss = self.model.loss(**batch.to(self.device).inputs).float() * weight
        loss.backward()
        return loss.detach()

    def try_backward(self, batch: Batch) -> None:
        """Take the memory of a last pass; the gradients are of no use."""
        self.backward(batch, 1.0, last=True)

    def finish(self) -> None:
        """After the last pass of a step: what is moved has its gradients."""

    def norm(self) -> Tensor:
        """The norm of all gradients together, the same on all processes."""
        return nn.utils.get_total_norm([p.grad for p in self.moved.values() if p.grad is not None])

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for parameter in (*self.parameters.values(), *self.moved.values()):
            parameter.grad = None


class Replicated(Passes):
    """Every process has the whole model: torch's DistributedDataParallel."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        refuse_another_start(model)
        self.wrapped = DistributedDataParallel(Loss(model, self.parameters.values()))
        self.wrapped.register_comm_hook(None, summed)

    def backward(self, batch: Batch, weight: float, last: bool) -> Tensor:
        with nullcontext() if last else self.wrapped.no_sync():
            loss = self.wrapped(**batch.to(self.device).inputs).float() * weight
            loss.backward()
        return loss.detach()

    def try_backward(self, batch: Batch) -> None:
        # Where a gradient does not come torch would wait for it, and refuse the first step before we can say which.
        self.backward(batch, 1.0, last=False)


class Sharded(Passes):
    """Every process has its rows: torch's FSDP2, which `models.parallel.shard` has told what belongs together."""

    def __init__(self, model: Any) -> None:
        shares.let_go(model)  # after an evaluation some weights are still put together
        super().__init__(model)
        self.moved = {name: nn.Parameter(shares.local(p.detach())) for name, p in self.parameters.items()}

    def backward(self, batch: Batch, weight: float, last: bool) -> Tensor:
        self.model.set_requires_gradient_sync(last)
        return super().backward(batch, weight, last)

    def finish(self) -> None:
        for name, parameter in self.parameters.items():
            moved = self.moved[name]
            assert moved.data_ptr() == shares.local(parameter.detach()).data_ptr(), f"{name} has been put elsewhere"
            moved.grad = None if parameter.grad is None else shares.local(parameter.grad)

    def norm(self) -> Tensor:
        own = super().norm()
        (squares,) = world.sums(own.item() ** 2)
        return own.new_tensor(squares**0.5)


class Loss(nn.Module):
    """A model as DistributedDataParallel is to know it: what is trained, and the loss for forward.

    All else in the model is not its business. It would send the base from process to process, and its scales with every
    pass.
    """

    def __init__(self, model: Any, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)
        self.loss = model.loss  # a method of it, and thus no module in this one

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.loss(**inputs)


def summed(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sum gradients over the processes, where DistributedDataParallel by itself would take their mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])  # pyrefly: ignore[missing-attribute]


def passes_of(model: Any) -> Passes:
    """The way that fits: alone, with shares if the model is shared, else with a copy for each process."""
    if world.size() == 1:
        return Passes(model)
    return Sharded(model) if shares.any_shared(model) else Replicated(model)


def trainable(model: Any) -> dict[str, nn.Parameter]:
    """Give what is to be trained, by name."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not parameters:
        raise ConfigError("the model has no trainable parameter; attach adapters before training")
    return parameters


def refuse_another_start(model: nn.Module) -> None:
    """Make sure that all processes begin with the same weights, bit for bit.

    They do if they have read the same files and drawn the same numbers; several machines may have other files.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sums = world.from_all({name: checksum(tensor) for name, tensor in tensors.items()})
    for rank, found in enumerate(sums):
        other = next((name for name in {**sums[0], **found} if sums[0].get(name) != found.get(name)), None)
        if other is not None:
            raise CheckpointError(
                f"{other} is not the same in process 0 and process {rank}, so they would train two models; "
                "see that all machines have the same checkpoint and the same versions"
            )


@torch.no_grad()
def checksum(tensor: Tensor) -> tuple[str, tuple[int, ...], int]:
    """Type, shape, and a sum over the bytes that tells where in which row they stand."""
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    count = max(1, tensor.shape[0]) if tensor.ndim else 1
    rows = content.view(count, content.numel() // count)
    down, across = rows.sum(0, dtype=torch.int64), rows.sum(1, dtype=torch.int64)
    total = sum((line * torch.arange(1, len(line) + 1, device=line.device)).sum() for line in (down, across))
    return str(tensor.dtype), tuple(tensor.shape), int(total)
