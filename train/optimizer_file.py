"""An optimizer's states as plain tensors in one file, each named after its parameter: `<parameter>.<state>`.

The settings of its groups, which are numbers and not tensors, come as JSON beside it. Both together are what
`state_dict` gives; there the parameters have numbers, which say nothing to whoever opens the file. States that several
processes share are whole in the file (`train/shared_states.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.errors import CheckpointError
from models.parallel import shares, world
from models.readers import SafetensorsReader
from train.paged.fused import FusedOptimizer
from train.passes import Passes
from train.shared_states import collected, own_states

FILE = "optimizer.safetensors"
SHARDS = "shards"  # in the file's metadata: on how many processes states were, if they were shared


@dataclass(frozen=True)
class States:
    """All that an optimizer knows, as the file has it; only the main process has the tensors."""

    tensors: dict[str, Tensor]
    groups: list[Any]
    """Their settings, with the names of their parameters."""
    shards: int
    """On how many processes the states were; 1 where each had all."""


def collect_states(optimizer: FusedOptimizer, passes: Passes) -> States:
    """Copy the states to the CPU's memory of the main process, one after the other; all processes have to ask for them.

    States with numbers that are none are refused by all.
    """
    optimizer.evict()  # a device that is short of memory need not take them in to be read
    tensors: dict[str, Tensor] = {}
    broken: list[str] = []
    for name, moved in passes.moved.items():
        for key, state in optimizer.state.get(moved, {}).items():
            if state.is_floating_point() and not bool(state.isfinite().all()):
                broken.append(f"{name}.{key}")
            whole = collected(key, state, passes.parameters[name])
            if whole is not None:
                tensors[f"{name}.{key}"] = whole
    broken = list(dict.fromkeys(name for found in world.from_all(broken) for name in found))
    if broken:
        raise RuntimeError(f"the optimizer's {broken[0]} holds NaN or infinity ({len(broken)} states in all do)")
    names = {moved: name for name, moved in passes.moved.items()}
    groups = [group | {"params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    shared = any(map(shares.is_shared, passes.parameters.values()))
    return States(tensors, groups, world.size() if shared else 1)


def save_states(states: States, directory: Path) -> None:
    """Write the states, and read them back."""
    # One entry only: safetensors writes several in an order that differs from process to process.
    metadata = {"format": "pt"} if states.shards == 1 else {SHARDS: str(states.shards)}
    save_file(states.tensors, directory / FILE, metadata)
    reader = SafetensorsReader(directory / FILE)
    for name, tensor in states.tensors.items():
        if name not in reader.shapes or not torch.equal(reader.read(name), tensor):
            raise RuntimeError(f"{directory / FILE}: {name} differs after writing; the disk may be failing")


def restore_states(optimizer: FusedOptimizer, passes: Passes, directory: Path, groups: list[Any]) -> None:
    """Take over the states and the settings that were saved for the same parameters in the same groups.

    They may have been on another number of processes; each reads what is its own.
    """
    names = {moved: name for name, moved in passes.moved.items()}
    own = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    if own != [group["params"] for group in groups]:
        raise CheckpointError(f"{directory}: the optimizer's parameters are not those of this training")
    numbers = {name: number for number, name in enumerate(name for group in own for name in group)}
    settings = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
        | {"params": [numbers[name] for name in group["params"]]}
        for group in groups
    ]
    found = read_states(directory / FILE, passes.parameters)
    try:
        states = {numbers[name]: state for name, state in found.items()}
        optimizer.load_state_dict({"state": states, "param_groups": settings})
    except ValueError as error:
        raise CheckpointError(f"{directory / FILE}: is not of this optimizer: {error}") from error


def read_states(path: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """This process's part of all states in the file, by the names of their parameters."""
    reader = SafetensorsReader(path)
    shards = reader.metadata.get(SHARDS, "1")
    if not (shards.isascii() and shards.isdigit() and int(shards)):
        raise CheckpointError(f"{path}: {SHARDS} is {shards!r:.20} and must be a number of processes, from 1 on")
    keys: dict[str, list[str]] = {}
    for full in reader.shapes:
        name, _, key = full.rpartition(".")
        if name not in parameters:
            raise CheckpointError(f"{path}: has {full}, a state of a parameter that is not trained here")
        keys.setdefault(name, []).append(key)
    return {name: own_states(reader, name, found, parameters[name], int(shards)) for name, found in keys.items()}
