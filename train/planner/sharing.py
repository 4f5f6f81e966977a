"""What torch's FSDP2 takes and gives back in a step, at the moments at which it does, for a plan without processes.

One process of N is planned, the first, which has the most rows. Its ledger has what FSDP2 (torch.distributed.fsdp,
2.11 to 2.13) has:

- of every parameter ceil(rows / N) rows, padding included, in a tensor of its own; buffers are whole.
- to put a unit together, one buffer for all its parameters, N shares long, and then each parameter whole in memory of
  its own, N shares long as well. In forward that buffer stays until the next unit's weights are copied out of theirs,
  and the last one's until the loss is there; in backward it goes when its own are. (A process that casts or brings
  shares over from the CPU copies them first.)
- a block is whole while it runs. In backward the block before it is already on its way: its buffer is there. The root
  (embedding, last norm, head) is whole from the beginning of forward to the end of backward.
- gradients of whole weights, as autograd makes them. Until a step's last micro-batch they stay whole, in the dtype in
  which they are summed. In the last one, when a block's backward is done, they are copied into one buffer and freed,
  and the process's part of their sum is another; the buffer stays until the next block's is wanted.

Nothing is sent: the tensors are made on "meta", where the simulation enters them. With offload to the CPU shares,
their gradients and the optimizer's states are counted apart, as the host's.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels.planned import in_backward
from models.model import Model
from models.parallel.shard import units
from train.data.batches import Batch
from train.passes import Passes
from train.planner.ledger import Ledger
from train.planner.step import Job
from train.planner.traffic import Traffic

GRADIENTS = "gradients"
GATHERED = "gathered"
SENT = "sent"


class SharedPasses(Passes):
    """Passes of a process that has its share: the optimizer moves shares."""

    def __init__(self, model: Model, sharing: "Sharing") -> None:
        super().__init__(model)
        self.sharing = sharing
        self.moved = {name: sharing.share_of[parameter] for name, parameter in self.parameters.items()}

    def backward(self, batch: Batch, weight: float, last: bool) -> Tensor:
        self.sharing.last = last
        return super().backward(batch, weight, last)


class Shared:
    """A parameter, of which a process has some rows; the model's own is made whole and let go of."""

    def __init__(self, ledger: Ledger, whole: nn.Parameter, processes: int, dtype: torch.dtype | None) -> None:
        """`dtype` is what it is cast to where it is put together, if to another than its own."""
        self.ledger, self.whole = ledger, whole
        rows = -(-whole.shape[0] // processes)
        entry = ledger.live[whole.untyped_storage()._cdata]
        before, ledger.label = ledger.label, entry.label
        share = torch.empty((rows, *whole.shape[1:]), dtype=whole.dtype, device="meta")
        ledger.label = before
        self.share = nn.Parameter(share, requires_grad=whole.requires_grad)
        self.cast = dtype is not None and whole.is_floating_point() and dtype != whole.dtype
        if self.cast:
            whole.data = torch.empty(whole.shape, dtype=dtype, device="meta")
        self.nbytes = share.numel() * whole.element_size()
        """Of the share, as it is sent."""
        self.processes = processes
        self.summed: Tensor | None = None
        ledger.resize(whole, 0, GATHERED)

    def put_together(self) -> None:
        self.ledger.resize(self.whole, self.nbytes * self.processes, GATHERED)

    def let_go(self) -> None:
        self.ledger.resize(self.whole, 0, GATHERED)

    def keep_gradient(self, dtype: torch.dtype | None) -> None:
        """Sum what autograd has made in the dtype of sums."""
        if self.summed is not None or (self.whole.grad is not None and dtype not in (None, self.whole.grad.dtype)):
            made = self.gradient()
            assert made is not None
            self.summed = made.to(dtype)

    def gradient(self) -> Tensor | None:
        """The whole gradient, which is handed over."""
        made, self.whole.grad = self.whole.grad, None
        if self.summed is None:
            return made
        summed, self.summed = self.summed, None
        return summed.add_(made) if made is not None else summed


@dataclass(eq=False)
class Unit:
    """Parameters that are put together at once."""

    parameters: list[Shared]
    whole: bool = False
    buffer: Tensor | None = None
    """What is on its way."""
    when: str = "idle"
    order: list[int] = field(default_factory=list)
    """Its places among the units that have run forward."""


class Sharing:
    """FSDP2's part in the steps of one process."""

    def __init__(self, ledger: Ledger, model: Model, job: Job, kind: str) -> None:
        self.ledger, self.kind, self.processes = ledger, kind, job.processes
        self.offload = job.fsdp.cpu_offload and kind == "cuda"
        self.sums = torch.float32 if job.fsdp.mixed_precision else None
        self.host: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()
        self.share_of: dict[Tensor, nn.Parameter] = {}
        self.units: list[Unit] = []
        self.ran: list[Unit] = []
        self.copied_out: Tensor | None = None
        self.leaving: Tensor | None = None
        self.last, self.queued = True, False

        dtype = model.dtype if job.fsdp.mixed_precision else None
        for module in [*units(model), model]:
            own = [p for p in module.parameters() if p not in self.share_of]
            unit = Unit([Shared(ledger, parameter, self.processes, dtype) for parameter in own])
            self.share_of |= {parameter.whole: parameter.share for parameter in unit.parameters}
            self.units.append(unit)
            if module is not model:
                module.register_forward_pre_hook(partial(self.enter_module, unit), with_kwargs=True)
                module.register_forward_hook(partial(self.leave_module, unit))
        if self.offload:
            for share in self.share_of.values():
                self.to_host(share)
        self.root = self.units[-1]
        for name in model.entries:
            setattr(model, name, partial(self.run, getattr(model, name)))

    def run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One of the model's entries, around which the root is put together; one may call another."""
        passed = self.enter(self.root, args, kwargs)
        args, kwargs = (args, kwargs) if passed is None else passed
        output = method(*args, **kwargs)
        self.leave(self.root, output)
        return output

    def begin(self, states: Tensor) -> None:
        """The step that is planned begins: the optimizer has its states, and what was sent before is forgotten."""
        self.sizes.clear()
        if self.offload:
            del self.host[GRADIENTS]  # those of the step before
            self.to_host(states)

    def traffic(self, rounds: int) -> Traffic:
        """What is sent in a step of so many micro-batches, by what was sent in the one that was gone through."""
        forward, backward = (self.sizes[when] // self.sizes["rounds"] for when in ("forward", "backward"))
        return Traffic(self.processes, rounds, forward, backward, self.sizes["reduced"], 0)

    def to_host(self, tensor: Tensor) -> None:
        """Let a tensor be in the CPU's memory."""
        entry = self.ledger.live[tensor.untyped_storage()._cdata]
        self.host[str(entry.label)] += entry.nbytes
        self.ledger.resize(tensor, 0, entry.label)

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        before, self.ledger.label = self.ledger.label, label
        try:
            yield
        finally:
            self.ledger.label = before

    # Forward

    def enter_module(self, unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.enter(unit, args, kwargs)

    def leave_module(self, unit: Unit, module: nn.Module, args: Any, output: Any) -> None:
        self.leave(unit, output)

    def enter(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if in_backward():  # computed again, and whole already
            return None
        self.send_for(unit, "forward")
        self.take(unit, forward=True)
        inside, unit.when = unit.when == "forward", "forward"
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.requires_grad]
        if inside or not inputs or not torch.is_grad_enabled():
            return None
        passed = dict(zip(map(id, inputs), Passed.apply(self, unit, *inputs), strict=True))
        return tuple(passed.get(id(v), v) for v in args), {name: passed.get(id(v), v) for name, v in kwargs.items()}

    def leave(self, unit: Unit, output: Any) -> None:
        if in_backward():
            return
        if unit is not self.root or unit.when != "forward":  # an entry that was called by another has ended before
            self.let_go(unit)
        unit.order.append(len(self.ran))
        self.ran.append(unit)
        unit.when = "idle"
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self.before_backward(unit))
        if unit is self.root:
            self.copied_out = None

    def send_for(self, unit: Unit, when: str) -> None:
        """Take the buffer for a unit's weights, of this process's share and then of all."""
        if unit.whole or unit.buffer is not None:
            return
        nbytes = sum(p.nbytes for p in unit.parameters)
        with self.labelled(SENT):
            unit.buffer = torch.empty(nbytes * self.processes, dtype=torch.uint8, device="meta")
        copied = sum(p.nbytes for p in unit.parameters if p.cast or self.offload)
        self.ledger.reach(copied, SENT)
        self.carry(unit.buffer.nbytes)
        self.sizes[when] += unit.buffer.nbytes

    def carry(self, nbytes: int) -> None:
        """What a collective over so many bytes takes for itself: gloo a copy of them, NCCL nothing of torch's."""
        if self.kind == "cpu":
            self.ledger.reach(nbytes, SENT)

    def take(self, unit: Unit, forward: bool) -> None:
        """Copy a unit's weights out of the buffer."""
        if unit.buffer is None:
            return
        if forward:
            self.copied_out = None
        for parameter in unit.parameters:
            parameter.put_together()
        if forward:
            self.copied_out = unit.buffer
        unit.buffer, unit.whole = None, True

    def let_go(self, unit: Unit) -> None:
        if unit.whole:
            for parameter in unit.parameters:
                parameter.let_go()
        unit.whole = False

    # Backward

    def before_backward(self, unit: Unit) -> None:
        if not self.queued:
            self.queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)
        if unit.when == "before":
            return
        unit.when = "before"
        self.send_for(unit, "backward")
        self.take(unit, forward=False)
        place = unit.order.pop() if unit.order else 0
        if place > 0:
            self.send_for(self.ran[place - 1], "backward")

    def after_backward(self, unit: Unit) -> None:
        unit.when = "after"
        self.let_go(unit)
        if not self.last:
            for parameter in unit.parameters:
                parameter.keep_gradient(self.sums)
            return
        self.leaving = None
        given = [(parameter.share, parameter.gradient()) for parameter in unit.parameters]
        self.reduce([(share, gradient) for share, gradient in given if gradient is not None])

    def reduce(self, given: list[tuple[nn.Parameter, Tensor]]) -> None:
        """Make of whole gradients this process's part of their sum."""
        if not given:
            return
        shares = [share for share, _ in given]
        sizes = [share.numel() for share in shares]
        dtype = self.sums or given[0][1].dtype
        with self.labelled(SENT):
            self.leaving = torch.empty(sum(sizes) * self.processes, dtype=dtype, device="meta")
        self.carry(self.leaving.nbytes)
        self.sizes["reduced"] += self.leaving.nbytes
        given.clear()  # copied, and free
        with self.labelled(GRADIENTS):
            part = torch.empty(sum(sizes), dtype=dtype, device="meta").to(shares[0].dtype)
        for share, flat in zip(shares, part.split(sizes), strict=True):
            share.grad = flat.view_as(share)
        if self.offload:
            self.to_host(part)

    def finish(self) -> None:
        """The end of backward."""
        self.queued = False
        for unit in [self.root, *self.units[:-1]]:
            if unit.when != "after":  # what came in needs no gradient
                self.after_backward(unit)
            unit.when, unit.order = "idle", []
            unit.buffer = None
        self.ran.clear()
        self.leaving = None
        self.sizes["rounds"] += 1


class Passed(torch.autograd.Function):
    """What goes into a unit, unchanged; when its gradient comes out, the unit's backward is done."""

    @staticmethod
    def forward(ctx: Any, sharing: Sharing, unit: Unit, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.sharing, ctx.unit = sharing, unit
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.sharing.after_backward(ctx.unit)
        return (None, None, *gradients)
