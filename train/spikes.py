"""Steps that stand out, told in log.txt: few label tokens, or a loss far above what it was.

With batches of similar length some steps have ten times fewer label tokens than others. The loss is a mean over them,
so each weighs ten times more, as if the learning rate had jumped for a moment. A loss that jumps is most often a record
that is unlike the others. Nothing here changes the training.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from models.parallel import world
from train.data.batches import Batch

WINDOW = 100  # steps whose labels and losses are the level
ENOUGH = 10  # steps before there is one
FEW = 4  # times fewer label tokens than the median: as many times the weight of each
DEVIATIONS = 8  # of the median absolute deviation above the median: about 5 sigma of a normal distribution
LEAST = 0.2  # share of the level that a jump of the loss must have: a smooth curve has tiny deviations


class Spikes:
    """The level of the last steps, and what to say of one that leaves it."""

    def __init__(self, before: Iterable[Mapping[str, Any]] = ()) -> None:
        """Begin with the lines of metrics.jsonl, if the run goes on from a checkpoint."""
        self.labels: deque[int] = deque(maxlen=WINDOW)
        self.losses: deque[float] = deque(maxlen=WINDOW)
        for line in before:
            if line["split"] == "train":
                self.labels.append(line["labels"])
                self.losses.append(line["loss"])

    def step(self, number: int, loss: float, labels: int, tokens: int, batches: Sequence[Batch]) -> list[str]:
        """What is remarkable about a step, which then belongs to the level.

        Several processes each give their own `batches`; all else is the same on each, and so is what is said.
        """
        said = []
        if len(self.labels) >= ENOUGH:
            usual, level = median(self.labels), median(self.losses)
            jump = max(DEVIATIONS * median(abs(x - level) for x in self.losses), LEAST * level)
            few, high = labels * FEW <= usual, loss > level + jump
            what = f"{tokens} tokens and {labels} labels, longest example {longest(batches)}" if few or high else ""
            if few:
                said.append(
                    f"step {number}: {labels} label tokens where {usual:g} are usual, so each weighs "
                    f"{usual / labels:.1f} times as much: {what}"
                )
            if high:
                said.append(f"step {number}: the loss jumped to {loss:.4f} from a level of {level:.4f}: {what}")
        self.labels.append(labels)
        self.losses.append(loss)
        return said


def longest(batches: Sequence[Batch]) -> str:
    """File and line of the longest example of all processes, and how many tokens it has."""
    found = ("unknown", 0)
    for batch in batches:
        lengths = example_lengths(batch)
        names = batch.where if len(batch.where) == len(lengths) else ("unknown",) * len(lengths)
        found = max([found, *zip(names, lengths, strict=True)], key=lambda pair: pair[1])
    name, length = max(world.from_all(found), key=lambda pair: pair[1])
    return f"{name} ({length} tokens)"


def example_lengths(batch: Batch) -> list[int]:
    """How many tokens each example of a batch has, row by row; a mask numbers those that share a row."""
    mask = batch.inputs.get("attention_mask")
    if mask is None:
        rows, width = batch.inputs["input_ids"].shape
        return [width] * rows
    return [int(n) for row in mask for n in row[row != 0].unique(return_counts=True)[1]]
