"""An optimizer that keeps the states of all parameters in one memory and updates them in one launch.

`torch.optim.Optimizer` is the contract: groups, hooks, closures, `state_dict`, pickling. What is different is where
states are. They lie in one `Store`; with `Paging` its memory is an arena of managed memory, which the driver may evict
to the CPU when a spike of activations needs the room (arXiv:2305.14314, section 3), and which a `Pager` brings back
ahead of the update. Whether states are paged is decided once, for all of them together: a page is larger than most LoRA
matrices, so that a rule by tensor would page next to none of them.

What is computed does not depend on any of that, bit for bit.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.dispatch import form
from kernels.updates import PARAMETER_DTYPES
from train.paged.memory import Paging
from train.paged.store import Slot, Store

State = dict[str, Tensor]


class FusedOptimizer(torch.optim.Optimizer):
    """What AdamW and Lion share; a subclass names its slots, its operator, and the numbers of a step."""

    slots: ClassVar[tuple[Slot, ...]]
    """The states of a parameter, in the order in which the operator takes them."""
    operator: ClassVar[str]
    """The row of `kernels.dispatch` that updates parameters from gradients, slots and numbers."""

    def __init__(self, params: Any, defaults: dict[str, Any], paging: Paging | None = None) -> None:
        self.paging = paging
        self.store: Store | None = None
        self.closed = False
        super().__init__(params, defaults)

    def numbers(self, group: Mapping[str, Any], step: int) -> tuple[float, ...]:
        """What the operator needs to know of a group's parameter in its step `step`, counted from 1."""
        raise NotImplementedError

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Refuse hyperparameters that make no sense, with a ValueError."""
        raise NotImplementedError

    def forms(self) -> tuple[tuple[Slot, ...], ...]:
        """The slots that a state which is loaded may have: its own, and others that `converted` takes."""
        return (self.slots,)

    def converted(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state of one of the forms in that of this optimizer's slots."""
        return state

    # One step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; the closure's loss, if one is given."""
        self.check_open()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"a step of {type(self).__name__} cannot be captured in a CUDA graph: its number counts")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = [(p, p.grad, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, grad, _ in given:
            check_gradient(p, grad)
        if given:
            self.cover([p for p, *_ in given])
            self.update(given)
        return loss

    def update(self, given: Sequence[tuple[Tensor, Tensor, Mapping[str, Any]]]) -> None:
        """Make a step for parameters that the store covers, with their gradients, in their groups."""
        store = self.store
        assert store is not None
        work: list[tuple[Tensor, Tensor, tuple[float, ...]] | None] = [None] * len(store.parameters)
        numbers: dict[tuple[int, int], tuple[float, ...]] = {}  # of a group in a step
        for (p, grad, group), step in zip(given, self.counted([p for p, *_ in given]), strict=True):
            key = id(group), step
            if key not in numbers:
                numbers[key] = self.numbers(group, step)
            work[store.indices[p]] = p.contiguous(), grad.contiguous(), numbers[key]

        for pieces in store.visit():
            here = [(piece, *task) for piece in pieces if (task := work[piece.index]) is not None]
            if here:
                params = [piece.of(p) for piece, p, _, _ in here]
                grads = [piece.of(grad) for piece, _, grad, _ in here]
                states = zip(*(piece.states for piece, *_ in here), strict=True)
                operator = form(self.operator, params[0].device, params, grads)
                operator(params, grads, *map(list, states), [n for *_, n in here])
        for p, _, _ in given:
            if not p.is_contiguous():
                task = work[store.indices[p]]
                assert task is not None
                p.copy_(task[0])

    def counted(self, params: Sequence[Tensor]) -> list[int]:
        """The number of each parameter's step that is being made, from 1; its states begin with the first."""
        assert self.store is not None
        for p in params:
            if not self.state[p]:
                self.state[p] = self.store.begin(p)
        rows = torch.tensor([self.store.indices[p] for p in params])
        self.store.steps[rows] += 1
        return self.store.steps[rows].int().tolist()

    # Where states are

    @property
    def memory_kind(self) -> str | None:
        """Where states are: "managed", "pinned" or "ordinary" memory; None while there are none."""
        return self.store.memory.kind if self.store else None

    @property
    def state_bytes(self) -> int:
        """Bytes of memory that states take."""
        return self.store.memory.nbytes if self.store else 0

    @property
    def managed_bytes(self) -> int:
        """Those of them in managed memory, which the driver may evict."""
        return self.state_bytes if self.memory_kind == "managed" else 0

    def evict(self) -> None:
        """Move paged states to the CPU now, before something large that needs no step, such as an evaluation."""
        if self.store:
            self.store.evict()

    def prefetch(self) -> None:
        """Move paged states to the device now; a step does so by itself."""
        if self.store:
            self.store.prefetch()

    def cover(self, params: Sequence[Tensor]) -> None:
        """Have a store with room for these parameters and all that may get a gradient; states that are there stay."""
        if self.store is not None and self.store.covers(params):
            return
        wanted = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        store = self.new_store([*wanted, *params, *self.state])
        self.prefetch()
        store.fill(self.state)
        self.take(store, list(self.state))  # and no one holds the old ones

    def new_store(self, params: Iterable[Tensor]) -> Store:
        return Store(type(self).__name__, list(dict.fromkeys(params)), self.slots, self.paging)

    def take(self, store: Store, params: Iterable[Tensor]) -> None:
        """Replace the store by one that holds these parameters' states already, and give the old one's memory back."""
        old, self.store = self.store, store
        self.state = defaultdict(dict, {p: store.states(p) for p in params})
        if old is not None and old is not store:
            old.close()

    def close(self) -> None:
        """Free the states' memory now; the optimizer is of no use afterwards. Closing twice is fine."""
        self.closed = True
        self.state = defaultdict(dict)
        store, self.store = self.store, None
        if store is not None:
            store.close()

    def __enter__(self) -> "FusedOptimizer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_open(self) -> None:
        if self.closed:
            raise RuntimeError(f"this {type(self).__name__} is closed and its states are gone; make a new one")

    # States from and to elsewhere

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides how training goes on, in plain tensors of their own: nothing in it is paged.

        States in managed memory come as copies in the CPU's memory, all others as copies where they are.
        """
        self.check_open()
        handle = self.register_state_dict_post_hook(lambda _, packed: self.plain(packed), prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def plain(self, packed: dict[str, Any]) -> dict[str, Any]:
        """A packed state dict with copies in place of what looks into the store."""
        return {**packed, "state": self.copies(packed["state"])}

    def copies(self, states: Mapping[Any, State]) -> dict[Any, State]:
        self.evict()  # a device that is short of memory need not take them in to be read
        there = "cpu" if self.memory_kind in ("managed", "pinned") else None
        return {
            key: {name: value.to(there, copy=True) if there else value.clone() for name, value in state.items()}
            for key, state in states.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of this class or of one that it can be converted from; paged states are paged again.

        A ValueError says what does not fit, and nothing has changed then.
        """
        self.check_open()
        # torch would cast states to their parameter's type on the way; what it does not know it leaves alone.
        handle = self.register_load_state_dict_pre_hook(lambda _, given: kept(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        self.check_open()
        return {
            "defaults": self.defaults,
            "state": self.copies(self.state),
            "param_groups": self.param_groups,
            "paging": replace(self.paging, runtime=None) if self.paging else None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Where `load_state_dict` and unpickling meet: check, allocate, and only then change anything."""
        for name, value in {"paging": state.get("paging"), "store": None, "closed": False}.items():
            self.__dict__.setdefault(name, value)
        groups = state["param_groups"]
        for old, new in zip(self.__dict__.get("param_groups", groups), groups, strict=True):
            for name, value in old.items():
                new.setdefault(name, value)  # what only our groups have, such as the ratio of LoRA+
            self.check_group(new)
        incoming = {p: s.state if isinstance(s, Kept) else s for p, s in state["state"].items()}
        incoming = {p: s for p, s in incoming.items() if s}
        positions = {p: i for i, p in enumerate(p for group in groups for p in group["params"])}
        for p, s in incoming.items():
            self.check_state(positions.get(p), p, s)

        store = self.store
        if incoming:
            covered = [*(p for p in positions if p.requires_grad), *incoming]
            if store is None or not store.covers(covered):
                store = self.new_store(covered)
            store.fill({p: self.converted(s) for p, s in incoming.items()})
        super().__setstate__({**state, "state": defaultdict(dict)})
        if store is not None:
            self.take(store, list(incoming))

    def check_state(self, position: int | None, p: Any, state: Mapping[str, Any]) -> None:
        """Refuse a state that is not one of this optimizer for this parameter."""
        if position is None:
            raise ValueError(f"the state dict has a state for {p!r}, which is no parameter of its groups")
        where = f"state of parameter {position}, of shape {tuple(p.shape)}"
        step = float(state.get("step", -1))
        if not (step >= 0 and step.is_integer()):
            raise ValueError(f"{where}: step must be a whole number and not negative, not {state.get('step')}")
        names = state.keys() - {"step"}
        form = next((form for form in self.forms() if names == {slot.name for slot in form}), None)
        if form is None:
            own = ", ".join(slot.name for slot in self.slots)
            came = ", ".join(sorted(map(str, names))) or "nothing"
            raise ValueError(f"{where}: {type(self).__name__} keeps {own}, but {came} came")
        for slot in form:
            value, shape = state[slot.name], slot.shape(p.shape)
            if not (isinstance(value, Tensor) and tuple(value.shape) == shape and alike(value.dtype, slot.dtype)):
                came = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{where}: {slot.name} must be {slot.dtype} of shape {shape}, not {came}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with hyperparameters of their own; their states begin at zero."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check_group(group)
            for p in group["params"]:
                if p.dtype not in PARAMETER_DTYPES:
                    allowed = ", ".join(map(str, PARAMETER_DTYPES))
                    raise ValueError(
                        f"a parameter must be one of {allowed}; one of shape {tuple(p.shape)} is {p.dtype}"
                    )
        except ValueError:
            self.param_groups.pop()
            raise


@dataclass(frozen=True)
class Kept:
    """A parameter's state on its way through torch."""

    state: Mapping[str, Any]


def kept(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "state": {k: Kept(state) for k, state in state_dict["state"].items()}}


def alike(given: torch.dtype, kept: torch.dtype) -> bool:
    """Whether a value of one type may be stored in the other: codes only as they are, numbers of any width."""
    return given == kept or (given.is_floating_point and kept.is_floating_point)


def check_gradient(p: Tensor, grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise RuntimeError(f"gradients must be dense; that of a parameter of shape {tuple(p.shape)} is {grad.layout}")
