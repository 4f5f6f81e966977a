"""Quantizing with an eye on what layers compute: block by block, while the checkpoint streams.

Windows of some text run through the model as far as it is already quantized. At each block its dense weights are read,
and then, in the order in which the block uses them: the second moment of a layer's inputs is gathered, the layer is
quantized for it (`nf4.calibrated`), and takes its place, so that later layers see what it made of the text. Layers
that read the same input (queries, keys and values; gate and up) share one moment. Which do, and in which order
layers come, is found by running the block once.

Memory is that of one block, of the moments of one group of layers, and of the text's hidden states: 2 bytes for each
token and unit of width. The head is not needed.

A model has to be one run of blocks over one text: LLaMA and RoBERTa, but not T5.
"""

from collections.abc import Callable, Iterator, Sequence
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
from nf4.inputs import Inputs

BATCH = 4  # windows at once


class Calibrated(NamedTuple):
    """A parameter to be stored."""

    name: str
    stored: Tensor | QuantizedTensor
    dense: Tensor | None = None
    """The weight that was quantized."""
    output_error: float | None = None
    """Norm of what its quantization changes in the layer's outputs, over the norm of the outputs without bias."""


class Call(NamedTuple):
    """What a block was called with beside its hidden states."""

    x: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]


class Reached(Exception):
    """The forward pass has come as far as it is wanted."""


@torch.no_grad()
def calibrated(
    model: Model, values: Values, windows: Int[Tensor, "windows tokens"], method: Method, device: torch.device
) -> Iterator[Calibrated]:
    """Every parameter of a model that has no values yet, those of its blocks quantized for these windows of text."""
    blocks = check(model, values, windows)
    prefixes = tuple(f"{name}." for name in blocks)
    for name in values.shapes:
        if not name.startswith(prefixes):
            value = values.make(name, device).stored
            yield Calibrated(name, value)
            if not name.startswith(model.heads):
                place(model, name, value)
    calls = [first_call(model, next(iter(blocks.values())), rows.to(device)) for rows in windows.split(BATCH)]
    for prefix, empty in blocks.items():
        block = deepcopy(empty).eval()  # so that its memory goes when its values are written
        yield from calibrated_block(f"{prefix}.", block, values, calls, method, device)
        calls = [call._replace(x=block(call.x, *call.rest, **call.named)) for call in calls]


def calibrated_block(
    prefix: str, block: nn.Module, values: Values, calls: Sequence[Call], method: Method, device: torch.device
) -> Iterator[Calibrated]:
    """The parameters of one block, whose name is `prefix`; it ends up with the weights that are stored."""
    dense = {}
    for name in values.shapes:
        if name.startswith(prefix):
            within = name.removeprefix(prefix)
            if values.quantizes(name):
                dense[within] = values.dense(name, device)
                place(block, within, dense[within].to(values.dtype))
            else:
                value = values.make(name, device).stored
                yield Calibrated(name, value)
                place(block, within, value)
    for group in groups(block, calls[0]):
        inputs = gathered(block, group[0], calls)
        for within in group:
            name, weight = f"{prefix}{within}", dense.pop(within)
            assert values.quant is not None
            with values.blaming(name):
                q = quantize_calibrated(weight, inputs, values.quant, method, name=name)
            q = replace(q, dtype=values.dtype)
            place(block, within, q)
            lost = inputs.error(weight.float() - kernels.dequantize(q, torch.float32))
            yield Calibrated(name, q, weight, (lost / max(inputs.error(weight), 1e-300)) ** 0.5)
    assert not dense, f"{prefix}: the block does not use {', '.join(dense)}"


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


def gathered(block: nn.Module, name: str, calls: Sequence[Call]) -> Inputs:
    """The second moment of what one layer reads when the block is called so; the block is run as far as that."""
    layer = block.get_submodule(name.removesuffix(".weight"))
    assert isinstance(layer, Linear)
    inputs = Inputs(layer.in_features, calls[0].x.device)

    def take(layer: nn.Module, args: Any) -> None:
        inputs.add(args[0])
        raise Reached

    hook = layer.register_forward_pre_hook(take)
    try:
        for call in calls:
            with suppress(Reached):
                block(call.x, *call.rest, **call.named)
    finally:
        hook.remove()
    return inputs


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
