"""What the processes of a step send each other, in bytes.

The collectives of a step: weights are put together from shares before a block runs, in forward and again in backward
(all-gather), once for every micro-batch of a process; gradients are summed into shares once a step (reduce-scatter).
With whole models (DDP) gradients are summed once a step and are whole everywhere afterwards (all-reduce). Of a
collective over G bytes a process sends at least (N - 1) / N G and receives as much; an all-reduce is a reduce-scatter
and an all-gather, twice that. Not counted are the few numbers of a step that are told beside: counts of labels, the
loss, the norm.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors of collectives: whole ones, padding included, as every process has them."""

    processes: int = 1
    rounds: int = 1
    """Micro-batches that a process goes through in a step."""
    forward: int = 0
    """Put together in forward, in each round."""
    backward: int = 0
    """Put together in backward, in each round."""
    reduced: int = 0
    """Summed into shares, in each step."""
    all_reduced: int = 0
    """Summed for every process, in each step."""

    @property
    def gathered(self) -> int:
        """Put together in a step."""
        return self.rounds * (self.forward + self.backward)

    @property
    def sent_in_round(self) -> int:
        """What a process sends while it goes through a micro-batch; it receives as much."""
        return self.part(self.forward + self.backward)

    @property
    def sent(self) -> int:
        """What a process sends in a step; it receives as much."""
        return self.part(self.gathered + self.reduced + 2 * self.all_reduced)

    @property
    def total(self) -> int:
        """What all processes send in a step."""
        return self.processes * self.sent

    def part(self, nbytes: int) -> int:
        """What of a collective's tensor goes out from one process."""
        return nbytes * (self.processes - 1) // self.processes
