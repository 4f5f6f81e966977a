"""One seed for everything that draws numbers, and one for each micro-batch of each step."""

import random
from hashlib import sha256

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on every device; before adapters are made, which are random."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # numpy takes 32 bits
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, micro_batch: int = 0) -> None:
    """Seed everything for a micro-batch of a step, so that its dropout depends on these numbers alone.

    No generator has a state to save then, and nothing that drew numbers before changes a step: not an evaluation, not a
    trial of the longest batch, and not the micro-batches that another process has taken. The numbers are hashed:
    neighbouring seeds of a run must not give one run the dropout that another has a step later.
    """
    text = f"{seed}/{step}/{micro_batch}" if micro_batch else f"{seed}/{step}"  # what an undivided step has
    seed_everything(int.from_bytes(sha256(text.encode()).digest()[:8], "little") >> 1)
