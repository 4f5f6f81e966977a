"""How far a run is: the one small object that the loop itself remembers from one step to the next."""

from dataclasses import dataclass


@dataclass
class LoopState:
    """Everything else in a step follows from its number: the learning rate, the order of the data, dropout."""

    step: int = 0
    """Steps made."""
    epoch: int = 0
    """The epoch of the next micro-batch."""
    batch: int = 0
    """The next micro-batch's position in that epoch."""
    tokens: int = 0
    """Tokens read, padding not counted."""
    evaluated: int = -1
    """The step after which held-out examples were looked at last; -1 if never."""
