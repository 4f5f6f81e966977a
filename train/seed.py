"""One seed for everything that draws numbers, and one for each step."""

import random
from hashlib import sha256

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on every device; before adapters are made, which are random."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # numpy takes 32 bits
    torch.manual_seed(seed)


def seed_step(seed: int, step: int) -> None:
    """Seed everything for one step, so that its dropout depends on the run's seed and the step's number alone.

    No generator has a state to save then, and nothing that drew numbers before, an evaluation or a trial of the
    longest batch, changes a step. The two numbers are hashed: neighbouring seeds of a run must not give one run the
    dropout that another has a step later.
    """
    seed_everything(int.from_bytes(sha256(f"{seed}/{step}".encode()).digest()[:8], "little") >> 1)
