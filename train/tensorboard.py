"""TensorBoard, for those who watch runs there: what a run appends to its journals, as scalars.

`metrics.jsonl` stays what counts; these are copies, in RUN/tensorboard, made as the lines are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from models.errors import ConfigError
from train.run import Run

FOLDER = "tensorboard"


@contextmanager
def tensorboard(run: Run, step: int = 0, *, on: bool = True) -> Iterator[None]:
    """Write the run's numbers as scalars as long as the block lasts.

    A run that goes on from a step makes TensorBoard forget what an earlier process has written beyond it.
    """
    if not on:
        yield
        return
    check_installed()
    from torch.utils.tensorboard import SummaryWriter

    purge = step + 1 if step else None
    with SummaryWriter(str(run.directory / FOLDER), purge_step=purge) as writer:

        def listen(journal: str, record: Mapping[str, Any]) -> None:
            for tag, value in scalars(journal, record).items():
                writer.add_scalar(tag, value, record["step"])

        run.listeners.append(listen)
        try:
            yield
        finally:
            run.listeners.remove(listen)


def check_installed() -> None:
    """Refuse before anything has begun where TensorBoard is missing."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard is not installed; pip install 'qlora-from-scratch[tensorboard]', or leave it out"
        )


def scalars(journal: str, record: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a journal's line by tag.

    >>> scalars("metrics.jsonl", {"step": 3, "split": "train", "loss": 1.5})
    {'train/loss': 1.5}
    """
    if journal not in ("metrics.jsonl", "timing.jsonl"):
        return {}
    group = record.get("split", "timing")
    return {f"{group}/{name}": value for name, value in record.items() if name not in ("step", "split")}
