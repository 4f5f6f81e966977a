"""Quantizing with an eye on what layers compute: block by block, while the checkpoint streams.

Windows of some text run through the model as far as it is already quantized, and beside it through the model as it
was. At each block its dense weights are read, and then, in the order in which the block uses them: what a layer reads
and answers is gathered on both sides, the layer is quantized for it (`nf4.calibrated`), and takes its place, so
that later layers see what it made of the text. Layers that read the same input (queries, keys and values; gate and
up) share its second moment. Which do, and in which order layers come, is found by running the block once.

A layer is to answer what it answered in the dense model, though it reads something else by now (`asymmetric`), or else
what its dense weight answers to what it reads.

Memory is that of one block, of the moments of one group of layers, of the text's hidden states on both sides, and of
what the layers of one dense block answer to it: all in all some 2 bytes for each token and each output of a block's
layers. The head is not needed.

A model has to be one run of blocks over one text: LLaMA and RoBERTa, but not T5.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

import kernels
from models.checkpoint import Values, place
from models.errors import ConfigError, DataError
from models.linear import Linear
from models.model import Model, Stack
from nf4 import QuantizedTensor
from nf4.calibrated import Method, quantize_calibrated
from nf4.inputs import Inputs, Residuals

BATCH = 4  # windows at once


class Calibration(NamedTuple):
    """What codes are chosen for, and how."""

    windows: Int[Tensor, "windows tokens"]
    """Text in tokens."""
    method: Method = "feedback"
    asymmetric: bool = True
    """Aim at what the dense model computes, and not at what dense layers make of the quantized model's inputs."""


class Calibrated(NamedTuple):
    """A parameter to be stored."""

    name: str
    stored: Tensor | QuantizedTensor
    dense: Tensor | None = None
    """The weight that was quantized."""
    output_error: float | None = None
    """How far the layer's outputs in the quantized model are from those in the dense model: the norm of the
    difference, over the norm of what its dense weight gives."""


class Call(NamedTuple):
    """What a block was called with beside its hidden states."""

    x: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]


class Reached(Exception):
    """The forward pass has come as far as it is wanted."""


def calibrated(model: Model, values: Values, calibration: Calibration, device: torch.device) -> Iterator[Calibrated]:
    """Every parameter of a model that has no values yet, those of its blocks quantized for the text."""
    blocks = check(model, values, calibration.windows)
    prefixes = tuple(f"{name}." for name in blocks)
    for name in values.shapes:
        if not name.startswith(prefixes):
            value = values.make(name, device).stored
            yield Calibrated(name, value)
            if not name.startswith(model.heads):
                place(model, name, value)
    first = next(iter(blocks.values()))
    calls = [first_call(model, first, rows.to(device)) for rows in calibration.windows.split(BATCH)]
    as_dense = calls
    for prefix, empty in blocks.items():
        block = deepcopy(empty).eval()  # a copy, so that its memory goes with it
        weights = yield from filled(block, f"{prefix}.", values, device)
        used = groups(block, calls[0])
        assert {name for group in used for name in group} == set(weights), f"{prefix} does not use all of its layers"
        wanted, as_dense = run(block, as_dense, list(weights))
        for group in used:
            inputs, residuals = gathered(block, group, calls, [wanted.pop(name) for name in group])
            for name, missed in zip(group, residuals, strict=True):
                found = quantized(f"{prefix}.{name}", weights.pop(name), inputs, missed, values, calibration)
                yield found
                place(block, name, found.stored)
        _, calls = run(block, calls)


def filled(
    block: nn.Module, prefix: str, values: Values, device: torch.device
) -> Generator[Calibrated, None, dict[str, Tensor]]:
    """Give a block its dense weights, and back those to be quantized; the other parameters are final."""
    weights = {}
    for name in values.shapes:
        if not name.startswith(prefix):
            continue
        within = name.removeprefix(prefix)
        if values.quantizes(name):
            weights[within] = values.dense(name, device)
            place(block, within, weights[within].to(values.dtype))
        else:
            value = values.make(name, device).stored
            yield Calibrated(name, value)
            place(block, within, value)
    return weights


def quantized(
    name: str, weight: Tensor, inputs: Inputs, missed: Residuals, values: Values, calibration: Calibration
) -> Calibrated:
    """A layer's weight as it is to be stored."""
    assert values.quant is not None
    aim = missed if calibration.asymmetric else None
    with values.blaming(name):
        q = quantize_calibrated(weight, inputs, values.quant, calibration.method, aim, name=name)
    q = replace(q, dtype=values.dtype)
    lost = missed.mean_square(kernels.dequantize(q, torch.float32) - weight.float(), inputs)
    return Calibrated(name, q, weight, (lost / max(inputs.mean_square(weight), 1e-300)) ** 0.5)


@torch.no_grad()
def run(
    block: nn.Module, calls: Sequence[Call], layers: Sequence[str] = ()
) -> tuple[dict[str, list[Tensor]], list[Call]]:
    """What some layers of a block answer to each call, and how the next block is called."""
    answers: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        block.get_submodule(name.removesuffix(".weight")).register_forward_hook(kept(found))
        for name, found in answers.items()
    ]
    try:
        after = [call._replace(x=block(call.x, *call.rest, **call.named)) for call in calls]
    finally:
        for hook in hooks:
            hook.remove()
    return answers, after


def kept(found: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    """A hook that keeps what a layer answers."""
    return lambda layer, args, output: found.append(output)


@torch.no_grad()
def groups(block: nn.Module, call: Call) -> list[list[str]]:
    """The weights of a block's linear layers in the order of their use; those that read the same input together."""
    used: list[tuple[str, Tensor]] = []
    layers = [(f"{name}.weight", layer) for name, layer in block.named_modules() if isinstance(layer, Linear)]
    hooks = [layer.register_forward_pre_hook(noted(used, name)) for name, layer in layers]
    try:
        block(call.x, *call.rest, **call.named)
    finally:
        for hook in hooks:
            hook.remove()
    found: list[list[str]] = []
    for i, (name, x) in enumerate(used):
        if i and x is used[i - 1][1]:
            found[-1].append(name)
        else:
            found.append([name])
    return found


def noted(used: list[tuple[str, Tensor]], name: str) -> Callable[[nn.Module, Any], None]:
    """A hook that remembers what a layer reads."""
    return lambda layer, args: used.append((name, args[0]))


@torch.no_grad()
def gathered(
    block: nn.Module, group: Sequence[str], calls: Sequence[Call], wanted: Sequence[Sequence[Tensor]]
) -> tuple[Inputs, list[Residuals]]:
    """What the layers of a group read, and by how much their answers are off what is wanted; the block is run no
    further than that.
    """
    layers = [block.get_submodule(name.removesuffix(".weight")) for name in group]
    device = calls[0].x.device
    sizes = [(layer.out_features, layer.in_features) for layer in layers if isinstance(layer, Linear)]
    inputs, residuals = Inputs(sizes[0][1], device), [Residuals(*size, device) for size in sizes]
    read: list[Tensor] = []
    answers: list[Tensor] = []

    def take(layer: nn.Module, args: Any, output: Tensor) -> None:
        read.append(args[0])
        answers.append(output)
        if len(answers) == len(group):
            raise Reached

    hooks = [layer.register_forward_hook(take) for layer in layers]
    try:
        for call, *wants in zip(calls, *wanted, strict=True):
            with suppress(Reached):
                block(call.x, *call.rest, **call.named)
            inputs.add(read[0])
            for residual, y, other in zip(residuals, wants, answers, strict=True):
                residual.add(y.float() - other.float(), read[0])
            read.clear()
            answers.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, residuals


@torch.no_grad()
def first_call(model: Model, block: nn.Module, rows: Int[Tensor, "B T"]) -> Call:
    """What the model calls its first block with when it reads these tokens."""
    calls: list[Call] = []

    def take(block: nn.Module, args: Any, named: dict[str, Any]) -> None:
        calls.append(Call(args[0], args[1:], named))
        raise Reached

    hook = block.register_forward_pre_hook(take, with_kwargs=True)
    try:
        with suppress(Reached):
            model(rows)
    finally:
        hook.remove()
    return calls[0]


def check(model: Model, values: Values, windows: Int[Tensor, "windows tokens"]) -> dict[str, nn.Module]:
    """The blocks by name, in the order in which they run; a model or a text that does not do is refused."""
    stacks = [stack for stack in model.modules() if isinstance(stack, Stack)]
    if len(stacks) != 1:
        raise ConfigError(
            f"calibrate: {type(model).__name__} is {len(stacks)} runs of blocks, but text is read by one; "
            "LLaMA and RoBERTa can be calibrated. Without calibration, --quant.scale search chooses better scales"
        )
    if values.stored:
        raise ConfigError(f"calibrate: {next(iter(values.stored))} is in 4 bits already; give the 16-bit checkpoint")
    if model.max_tokens is not None and windows.shape[1] > model.max_tokens:
        raise ConfigError(
            f"calibrate: windows have {windows.shape[1]} tokens; the model knows {model.max_tokens} positions"
        )
    widest = max(layer.in_features for name, layer in values.linears.items() if values.quantizes(name))
    if windows.numel() < widest:
        raise DataError(
            f"calibrate: {windows.numel()} tokens of text cannot tell how {widest} inputs of a layer go together; "
            f"give {widest} at least, and better 30,000"
        )
    names = {module: name for name, module in model.named_modules()}
    return {names[block]: block for block in stacks[0].blocks}
