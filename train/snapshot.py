"""What a run goes on from: the weights that are trained, the optimizer's states, and how far everything was.

    adapter_model.safetensors  adapter_config.json  (or model.safetensors  config.json)
    optimizer.safetensors      state.json

state.json holds the loop's state, the settings of the optimizer's groups, the sizes of the run's journals, and where
all of it came from: the run's settings, and the hashes of its data and its base.

All of it is as one process would have it, on however many it was made: weights and states that processes share are put
together for the file, which the main process writes, and each takes its part of them again. So a run can go on on
another number of processes.
"""

import errno
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from models.errors import CheckpointError, ConfigError, NonFiniteError, WriteError
from models.parallel import shares, world
from models.parallel.agreement import agreed
from train.checkpoint import newest_checkpoint, step_directory, write_checkpoint
from train.optimizer_file import collect_states, restore_states, save_states
from train.paged.fused import FusedOptimizer
from train.passes import Passes
from train.run import Run
from train.state import LoopState

FORMAT = 1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint that is whole, and what its state.json says."""

    directory: Path
    state: LoopState
    total: int
    """How many steps the run was to make."""
    journals: dict[str, int]
    """The sizes of the run's journals, in bytes."""
    origin: dict[str, Any]
    """Where it came from, as `Run.origin` gives it."""
    groups: list[Any]
    """The settings of the optimizer's groups."""

    def restore(self, passes: Passes, optimizer: FusedOptimizer, restore: Callable[[Any, Path], None]) -> LoopState:
        """Put weights and states back, and give the loop's state."""
        restore(passes.model, self.directory)
        restore_states(optimizer, passes, self.directory, self.groups)
        return LoopState(**asdict(self.state))


def save_snapshot(
    run: Run,
    passes: Passes,
    optimizer: FusedOptimizer,
    state: LoopState,
    *,
    total: int,
    keep: int,
    save: Callable[[Any, Path], None],
) -> Path:
    """Write the checkpoint of the state's step, and verify it before it gets its name.

    The run's journals are synced first, so that none can turn out shorter than the checkpoint says. Of several
    processes all have to call it, and the main one writes.
    """
    check_worth_saving(state.step, passes)
    states = collect_states(optimizer, passes)

    def fill(directory: Path) -> None:
        save(passes.model, directory)
        save_states(states, directory)
        content = {
            "format": FORMAT,
            "state": asdict(state),
            "total": total,
            "journals": run.sync_journals(),
            "origin": run.origin(),
            "groups": states.groups,
        }
        (directory / "state.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")

    with shares.whole(passes.model), agreed():
        if not world.is_main():
            return step_directory(run.checkpoints, state.step)
        try:
            return write_checkpoint(run.checkpoints, state.step, fill, keep)
        except (OSError, SafetensorError) as error:
            raise unwritable(run, f"the checkpoint of step {state.step} could not be written: {error}") from error


def newest_snapshot(run: Run, tell: Callable[[str], None]) -> Snapshot | None:
    """Give the newest checkpoint of a run that is whole, telling what is wrong with newer ones; None if it has none.

    The main process looks for all, since it means to read every byte.
    """
    with agreed():
        directory = newest_checkpoint(run.checkpoints, tell) if world.is_main() else None
    directory = world.from_main(directory)
    return None if directory is None else read_snapshot(directory)


def read_snapshot(directory: Path) -> Snapshot:
    """Read the state.json of a checkpoint that is whole."""
    path = directory / "state.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
        if raw["format"] != FORMAT:
            raise CheckpointError(f"{path}: is of format {raw['format']!r:.20}; this version reads format {FORMAT}")
        state = LoopState(**raw["state"])
        return Snapshot(directory, state, raw["total"], raw["journals"], raw["origin"], raw["groups"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: is not the state of a run ({error})") from error


def check_worth_saving(step: int, passes: Passes) -> None:
    """Refuse to save what no one could use: numbers that are none, or adapters that have learned nothing."""
    flags = world.most(*(not bool(parameter.isfinite().all()) for parameter in passes.moved.values()))
    broken = [name for name, it in zip(passes.moved, flags, strict=True) if it]
    if broken:
        raise NonFiniteError(
            f"step {step}: {broken[0]} holds NaN or infinity ({len(broken)} of {len(passes.moved)} parameters do), so "
            "no checkpoint is made; go on from the one before at a lower optimizer.learning_rate"
        )
    branches = [parameter for name, parameter in passes.moved.items() if ".lora_B." in name]
    if step >= 1 and branches and not any(world.most(*(bool(parameter.any()) for parameter in branches))):
        raise ConfigError(
            f"after {step} steps every lora_B is still zero: the adapter has learned nothing, and no checkpoint is "
            "made; look at the learning rate in metrics.jsonl"
        )


def unwritable(run: Run, what: str) -> WriteError:
    """Say that the run's directory takes no more, which checkpoint is good, and how to go on."""
    told: list[str] = []
    try:
        good = newest_checkpoint(run.checkpoints, told.append)
    except CheckpointError:
        good = None
    if good is None:
        return WriteError(
            f"{what}. There is no checkpoint yet; make room, then start again: qlora resume {run.directory}"
        )
    return WriteError(
        f"{what}. The last good checkpoint is {good}; make room, then go on: qlora resume {run.directory}"
    )


@contextmanager
def room(run: Run) -> Iterator[None]:
    """Around what writes into a run's directory: if there is no room left, say so in one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not full(error):
            raise
        raise unwritable(run, f"{run.directory} takes no more after step {run.step}: {error}") from error


def full(error: OSError | SafetensorError) -> bool:
    """Whether an error says that a disk, a quota or the size of a file is used up; safetensors only words it."""
    if isinstance(error, SafetensorError):
        found = re.search(r"os error (\d+)", str(error))
        return found is not None and int(found[1]) in FULL
    return error.errno in FULL
