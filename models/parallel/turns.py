"""Passes through one model by several processes, of which each needs as many as its own texts ask for.

A shared model can only be run by all processes at once, since each of them puts in its rows of every block. But one
has a longer text to write than another, and one has no text left. So before a pass each says what it wants to run. All
then run what comes first of that: those who want it, with what they have; the others with a single token, whose result
nobody reads. Who is done goes on in this way until all are. (The alternative, that all work on the same texts, would
make as many processes as slow as one.)

A process whose memory runs out within a pass still owes the others its rows of the blocks that are left. It lets go of
what it was computing, puts those blocks together with the others, and only then fails: so that all can agree on smaller
batches and go on.
"""

import traceback
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch

from models.device import is_out_of_memory
from models.model import Model
from models.parallel import world
from models.parallel.shares import engaged

T = TypeVar("T")


class Turns:
    """A context in which processes run one model at different times, through its `entries` but the loss.

    What they found is exchanged by `gathered`, which all call equally often. A model that is not shared is run by
    each as it likes.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.units = [unit for unit in engaged(model) if unit is not model]
        names = [name for name in model.entries if name != "loss"] if self.units else []
        self.entries: dict[str, Callable[..., Any]] = {name: getattr(model, name) for name in names}
        self.order: dict[str, list[Any]] = {}
        """The units that a pass through each entry puts together, one after the other."""
        self.passed: list[Any] = []
        """Those that this pass is done with."""
        self.undo: list[Callable[[], object]] = []
        self.running = False

    def gathered(self, value: T) -> list[T]:
        """What each process has found, by rank, when all are done with their passes."""
        while (agreed := self.agreed(None)) is not None:
            self.blank(agreed)
        return world.from_all(value)

    def agreed(self, wanted: str | None) -> str | None:
        """What all run next: of what any of them wants, the entry that comes first; None if they are all done."""
        if not self.entries:
            return None
        names = [*self.entries, None]
        (first,) = world.most(-names.index(wanted))
        return names[round(-first)]

    def run(self, name: str, *arguments: Any, **named: Any) -> Any:
        """A pass of this process, when it is its turn."""
        if self.running:  # one entry calls another: that is no pass of its own
            return self.entries[name](*arguments, **named)
        while (agreed := self.agreed(name)) != name:
            assert agreed is not None
            self.blank(agreed)
        try:
            return self.passing(name, *arguments, **named)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                traceback.clear_frames(error.__traceback__)  # they hold the memory of what was being computed
                for unit in self.order[name][len(self.passed) :]:
                    unit.unshard()  # which does nothing where this has been done
                    unit.reshard()
            raise

    @torch.no_grad()
    def blank(self, name: str) -> None:
        """A pass with a single token, for the sake of the others."""
        self.passing(name, *one_token(self.model, name))

    def passing(self, name: str, *arguments: Any, **named: Any) -> Any:
        self.running, self.passed = True, []
        try:
            return self.entries[name](*arguments, **named)
        finally:
            self.running = False

    def __enter__(self) -> "Turns":
        for unit in self.units:
            self.watch(unit)
        for name in self.entries:
            self.blank(name)
            self.order[name] = self.passed
        for name, entry in self.entries.items():
            setattr(self.model, name, partial(self.run, name))
            self.undo.append(partial(setattr, self.model, name, entry))
        return self

    def watch(self, unit: Any) -> None:
        """Note it whenever a pass is done with the unit, be it through its forward or through an entry of its own."""
        self.undo.append(unit.register_forward_hook(lambda *_: self.passed.append(unit)).remove)
        for name in getattr(unit, "entries", ()):
            entry = getattr(unit, name)
            setattr(unit, name, partial(self.noted, unit, entry))
            self.undo.append(partial(setattr, unit, name, entry))

    def noted(self, unit: Any, entry: Callable[..., Any], *arguments: Any) -> Any:
        found = entry(*arguments)
        self.passed.append(unit)
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for step in self.undo:
            step()


def one_token(model: Model, name: str) -> tuple[Any, ...]:
    """The least that an entry can be called with."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    if name not in ("decode", "new_cache"):
        return ids, None
    encoded = torch.zeros(1, 1, model.config.d_model, dtype=model.dtype, device=model.device)
    return (ids, encoded) if name == "decode" else (encoded, 1)
