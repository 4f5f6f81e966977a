"""An optimizer's states as plain tensors in one file, each named after its parameter: `<parameter>.<state>`.

The settings of its groups, which are numbers and not tensors, come as JSON beside it. Both together are what
`state_dict` gives; there the parameters have numbers, which say nothing to whoever opens the file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.errors import CheckpointError
from models.readers import SafetensorsReader
from train.paged.fused import FusedOptimizer

FILE = "optimizer.safetensors"


def save_states(optimizer: FusedOptimizer, parameters: Mapping[str, nn.Parameter], directory: Path) -> list[Any]:
    """Write the states, read them back, and give the settings of the groups."""
    packed = optimizer.state_dict()
    names = numbered(optimizer, parameters)
    states = {f"{names[i]}.{key}": t for i, state in packed["state"].items() for key, t in state.items()}
    broken = [name for name, t in states.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if broken:
        raise RuntimeError(f"the optimizer's {broken[0]} holds NaN or infinity ({len(broken)} states in all do)")
    save_file(states, directory / FILE, {"format": "pt"})
    reader = SafetensorsReader(directory / FILE)
    for name, tensor in states.items():
        if name not in reader.shapes or not torch.equal(reader.read(name), tensor.cpu()):
            raise RuntimeError(f"{directory / FILE}: {name} differs after writing; the disk may be failing")
    return [group | {"params": [names[i] for i in group["params"]]} for group in packed["param_groups"]]


def restore_states(
    optimizer: FusedOptimizer, parameters: Mapping[str, nn.Parameter], directory: Path, groups: list[Any]
) -> None:
    """Take over the states and the settings that `save_states` wrote for the same parameters in the same groups."""
    names = numbered(optimizer, parameters)
    own = [[names[i] for i in group["params"]] for group in optimizer.state_dict()["param_groups"]]
    if own != [group["params"] for group in groups]:
        raise CheckpointError(f"{directory}: the optimizer's parameters are not those of this training")
    reader = SafetensorsReader(directory / FILE)
    numbers = {name: number for number, name in enumerate(names)}
    states: dict[int, dict[str, Tensor]] = {}
    for name in reader.shapes:
        parameter, _, key = name.rpartition(".")
        if parameter not in numbers:
            raise CheckpointError(f"{directory / FILE}: has {name}, a state of a parameter that is not trained here")
        states.setdefault(numbers[parameter], {})[key] = reader.read(name)
    settings = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}
        | {"params": [numbers[name] for name in group["params"]]}
        for group in groups
    ]
    try:
        optimizer.load_state_dict({"state": states, "param_groups": settings})
    except ValueError as error:
        raise CheckpointError(f"{directory / FILE}: is not of this optimizer: {error}") from error


def numbered(optimizer: FusedOptimizer, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The names of the parameters in the order in which `state_dict` numbers them."""
    names = {parameter: name for name, parameter in parameters.items()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
