"""Merging an adapter into a 16-bit checkpoint, one tensor at a time.

    W' = round16(W + scaling B A)        in float32, rounded once

W is by default what the adapter was trained on: the decoded 4-bit weight, whose quantization error the adapter has
learned around. It may also be the original weight, out of a 16-bit checkpoint that is read along. In memory at a time
are the model as it is trained (4 bits and adapters), one tensor in float32 and one shard of the output; the 16-bit
model never is.

Every layer's account is kept: the adapter's signal ||W' - W|| against the noise ||original - decoded|| that
quantization brought. Where the signal is below the noise, the adapter does less to the layer than rounding did.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

import kernels
from models.attachment import adapted_layers, attached
from models.checkpoint import check_names, open_checkpoint, stored_in_4_bits
from models.errors import CheckpointError, ConfigError
from models.linear import AdaptableLinear, NF4Linear
from models.methods import merged, merged_bias, refuse_unmergeable
from models.model import Model
from models.precision import ADAPTERS, owner, part_of
from models.readers import RenamedReader
from models.tokenizer import Tokenizer, save_tokenizer
from models.whole import plain_name
from models.writer import SHARD_BYTES, CheckpointWriter

FLOATS = {"float64", "float32", "bfloat16", "float16", "F64", "F32", "BF16", "F16"}  # torch's names and GGUF's


@dataclass(frozen=True)
class MergedLayer:
    """What a layer's adapter does, beside what quantizing the layer did; norms are Frobenius norms."""

    name: str
    rank: int | None
    """Of LoRA's; other methods have none."""
    signal: float
    """||W' - W||, which for LoRA is ||scaling B A||."""
    weight: float
    """||W||, of the weight that the adapter was added to."""
    noise: float | None
    """||original - decoded||; None where the layer is not quantized or no original is at hand."""

    @property
    def relative(self) -> float:
        """The adapter's share of the weight."""
        return self.signal / self.weight if self.weight else 0.0

    @property
    def ratio(self) -> float | None:
        """Signal over noise."""
        return self.signal / self.noise if self.noise else None


@torch.no_grad()
def merge_checkpoint(
    model: Model,
    out: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Tokenizer | None = None,
) -> list[MergedLayer]:
    """Write a model that has adapters as a dense checkpoint; a failure on the way leaves nothing behind.

    `base` is a 16-bit checkpoint whose weights are taken instead of the model's own.
    """
    refuse_used(Path(out))
    layers = dict(adapted_layers(model))
    if attached(model) is None:
        raise CheckpointError("merge: the model has no adapter; name a run, or a checkpoint with --load.adapter")
    refuse_unmergeable(model)
    if base is not None and any(moves_base(layer) for layer in layers.values()):
        raise CheckpointError(
            "merge: the adapter's start took something out of its base (init pissa or loftq), so it fits no other; "
            "merge without --base"
        )
    other = None if base is None else base_reader(model, base)
    original = other or own_original(model)
    report = []
    with CheckpointWriter(out, shard_bytes) as writer:
        for name, parameter in dense_parameters(model).items():
            if other is None or parameter.requires_grad:  # trained whole, beside the adapters
                weight = current(model, name)
            else:
                weight = other.read(name).to(model.device)
            layer = layers.get(name.removesuffix(".weight"))
            if name.endswith(".bias") and name.removesuffix(".bias") in layers:
                weight = merged_bias(weight, layers[name.removesuffix(".bias")])
            if layer is not None:
                base_weight = weight.float()
                weight = merged(base_weight, layer)
                signal, size = norm(weight - base_weight), norm(base_weight)
                noise = None if original is None else quantization_noise(layer, original, name)
                rank = None if layer.lora_A is None else len(layer.lora_A.weight)
                report.append(MergedLayer(name.removesuffix(".weight"), rank, signal, size, noise))
                del base_weight
            weight = weight.to(dtype)
            if not all(extreme.isfinite() for extreme in weight.aminmax()):  # isfinite() of it all would copy it
                raise CheckpointError(f"merge: {name} has no finite values as {dtype}; give another --dtype")
            writer.add(name, weight)
            del weight
        if tokenizer is not None:
            save_tokenizer(tokenizer, writer.staging)
        writer.finish(model.config.to_dict(), str(dtype), None)
    return report


def refuse_used(out: Path) -> None:
    """The checkpoint is put where nothing is yet, so that nothing there is mixed with it."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; name a directory to write the checkpoint into")
    present = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if present:
        raise ConfigError(f"{out}: already holds {', '.join(present[:4])}; name another directory")


def dense_parameters(model: Model) -> dict[str, nn.Parameter]:
    """The parameters of the model without its adapters, by their names in files."""
    parameters = {}
    for name, parameter in model.named_parameters():
        module, leaf = owner(model, name)
        if part_of(model, name) != ADAPTERS and not (isinstance(module, NF4Linear) and leaf == "absmax_codes"):
            parameters[plain_name(name)] = parameter
    return parameters


def current(model: Model, name: str) -> Tensor:
    """What the model computes with; 4 bits decode to float32."""
    module, leaf = owner(model, name)
    if isinstance(module, NF4Linear) and leaf == "weight":
        return kernels.dequantize(module.quantized, torch.float32)
    return getattr(module, leaf).detach()


def dense_shape(model: Model, name: str) -> tuple[int, ...]:
    module, leaf = owner(model, name)
    if isinstance(module, NF4Linear) and leaf == "weight":
        return module.out_features, module.in_features
    return tuple(getattr(module, leaf).shape)


def moves_base(layer: AdaptableLinear) -> bool:
    """Is the layer's base another than its checkpoint's weight?"""
    return layer.lora_A is not None and layer.lora_config.init != "default"


def base_reader(model: Model, base: str | Path) -> RenamedReader:
    """The tensors of a 16-bit checkpoint for the parameters of the model; any other checkpoint is refused."""
    raw, reader, where = open_checkpoint(base)
    kind, ours = raw.get("model_type"), model.config.to_dict()["model_type"]
    if kind != ours:
        raise CheckpointError(f"{where}: the base is {kind!r}, but the adapter is for {ours!r}")
    renamed = RenamedReader(reader, model.parameter_named)
    stored = stored_in_4_bits(renamed)
    rounded = sorted(stored) or [name for name in renamed.shapes if renamed.stored(name).kind not in FLOATS]
    if rounded:
        raise CheckpointError(
            f"{renamed.where(rounded[0])}: {rounded[0]} is quantized ({renamed.stored(rounded[0]).kind}); --base takes "
            "the original 16-bit checkpoint, and without it the decoded 4-bit weights are taken"
        )
    own = dense_parameters(model)
    needed = [name for name in own if name in renamed.shapes or not own[name].requires_grad]
    check_names({name: dense_shape(model, name) for name in needed}, renamed, {})
    return renamed


def own_original(model: Model) -> RenamedReader | None:
    """The weights that the model was quantized from; None if its checkpoint was in 4 bits already."""
    if model.source is None:
        return None
    renamed = RenamedReader(open_checkpoint(model.source)[1], model.parameter_named)
    return None if stored_in_4_bits(renamed) else renamed


def quantization_noise(layer: AdaptableLinear, original: RenamedReader, name: str) -> float | None:
    """||original - decoded|| of a layer that is quantized and otherwise the original."""
    if not isinstance(layer, NF4Linear) or moves_base(layer):
        return None
    decoded = kernels.dequantize(layer.quantized, torch.float32)
    return norm(original.read(name).to(decoded.device, torch.float32) - decoded)


def norm(weight: Float[Tensor, "N K"]) -> float:
    """The Frobenius norm."""
    return float(torch.linalg.vector_norm(weight))
